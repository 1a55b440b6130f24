//go:build tools

// Package tools holds the version of the servers that the conformance suite's mesh tests talk to.
package tools

import (
	_ "istio.io/istio/pkg/test/echo/cmd/client"
	_ "istio.io/istio/pkg/test/echo/cmd/server"
)
