//! Who is where: workloads, services and policies; resolving and endpoint choice.
