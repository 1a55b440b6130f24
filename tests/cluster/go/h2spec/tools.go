//go:build tools

// Package tools holds the version of h2spec, which tests the HTTP/2 of gateways and waypoints.
package tools

import _ "github.com/summerwind/h2spec/cmd/h2spec"
