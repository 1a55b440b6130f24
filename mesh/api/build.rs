//! Compiles the protobufs of `proto/` without an installed `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "workload.proto",
        "authorization.proto",
        "zds.proto",
        "ca.proto",
        "discovery.proto",
        "core.proto",
        "status.proto",
        "l7.proto",
        "l7_backend.proto",
        "l7_gateway.proto",
        "l7_policy.proto",
        "external_auth.proto",
        "l7_stream.proto",
        "l7_telemetry.proto",
        "otlp_collector_logs.proto",
        "otlp_collector_trace.proto",
    ];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".")
        .btree_map(".")
        .boxed(".ambit.l7.Policy.external")
        // It has a private key.
        .skip_debug([".ambit.l7.ClientCertificate"])
        .compile_fds(descriptors)?;
    Ok(())
}
