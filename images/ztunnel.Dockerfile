# Context: a directory with the static programs, see `make images`.
FROM scratch
ARG VERSION=unknown REVISION=unknown
LABEL org.opencontainers.image.title="ambit/ztunnel" \
      org.opencontainers.image.description="The node proxy of Ambit: identity, mutual TLS and policy for the pods of a node" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY ztunnel /usr/local/bin/ztunnel
# Root, since it makes sockets in the network namespaces of pods; the chart drops what it doesn't need.
USER 0:0
ENTRYPOINT ["/usr/local/bin/ztunnel"]
