//! L4 authorization: compiled policies and their evaluation.
