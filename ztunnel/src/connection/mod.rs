//! What happens to a connection besides its bytes: how it can fail, how it is reported, when it is closed early.

pub mod error;
pub mod report;
pub mod review;
