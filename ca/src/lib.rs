//! The certificate authority: its keys, its policy and its service.
