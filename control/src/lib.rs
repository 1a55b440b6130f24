//! The control plane: Kubernetes objects in, proxy configuration out.
//!
//! [`source`] reads objects, by [`intake`] and the table of [`kind`]s, and reports what changed; [`index`] turns objects
//! into resources and recomputes only what a change touches; [`serve`] offers the resources over delta xDS and signs
//! certificates. Each knows only the one before. `keys` fetches the keys of token issuers that the index wants.
//! [`mod@write`] reports to the API server what came of its objects. [`app`] wires them, [`config`] says how.

pub mod api_server;
pub mod app;
pub mod config;
pub mod index;
pub mod intake;
mod keys;
pub mod kind;
pub mod mesh_config;
pub mod object;
mod observe;
pub mod serve;
pub mod source;
mod syncz;
pub mod write;
