# Context: a directory with the static programs, see `make images`.
FROM scratch
ARG VERSION=unknown REVISION=unknown
LABEL org.opencontainers.image.title="ambit/cli" \
      org.opencontainers.image.description="The command of Ambit: status, checks, and the chart's test" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY ambit /usr/local/bin/ambit
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/ambit"]
