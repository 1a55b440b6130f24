//go:build tools

// Package tools pins the conformance suite of Gateway API.
package tools

import (
	_ "sigs.k8s.io/gateway-api/conformance"
)
