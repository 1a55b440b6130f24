//! The control plane: Kubernetes objects in, proxy configuration out.
