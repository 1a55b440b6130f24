# Context: a directory with the static programs, see `make images`.
FROM scratch
ARG VERSION=unknown REVISION=unknown
LABEL org.opencontainers.image.title="ambit/node" \
      org.opencontainers.image.description="The node agent and CNI plugin of Ambit: which pods are in the mesh, and their redirection" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY ambit-node /usr/local/bin/ambit-node
COPY ambit-cni /usr/local/bin/ambit-cni
# Root, since it writes rules in the network namespaces of pods; the chart drops what it doesn't need.
USER 0:0
ENTRYPOINT ["/usr/local/bin/ambit-node"]
