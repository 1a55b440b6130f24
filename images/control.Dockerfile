# Context: a directory with the static programs, see `make images`.
FROM scratch
ARG VERSION=unknown REVISION=unknown
LABEL org.opencontainers.image.title="ambit/control" \
      org.opencontainers.image.description="The control plane of Ambit: Kubernetes objects in, configuration and certificates out" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY ambit-control /usr/local/bin/ambit-control
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/ambit-control"]
