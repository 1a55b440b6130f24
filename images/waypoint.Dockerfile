# Context: a directory with the static programs, see `make images`.
FROM scratch
ARG VERSION=unknown REVISION=unknown
LABEL org.opencontainers.image.title="ambit/waypoint" \
      org.opencontainers.image.description="The waypoint of Ambit: routes, retries and policy for requests to services" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY ambit-waypoint /usr/local/bin/ambit-waypoint
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/ambit-waypoint"]
