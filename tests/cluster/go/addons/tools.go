//go:build tools

// Package tools holds the version of Helm that the test cluster installs charts with.
package tools

import (
	_ "helm.sh/helm/v4/cmd/helm"
)
