{{/* What differs by platform, as YAML. The values of `node.cni` override it. */}}
{{- define "ambit.platform" -}}
{{- $paths := dict "binDir" "/opt/cni/bin" "confDir" "/etc/cni/net.d" "netnsDir" "/var/run/netns" "chained" true "ownList" false }}
{{- $platforms := dict
  "gke" (dict "binDir" "/home/kubernetes/bin")
  "openshift" (dict "binDir" "/var/lib/cni/bin" "confDir" "/etc/cni/multus/net.d" "chained" false)
  "k3s" (dict "binDir" "/var/lib/rancher/k3s/data/cni" "confDir" "/var/lib/rancher/k3s/agent/etc/cni/net.d")
  "microk8s" (dict "binDir" "/var/snap/microk8s/current/opt/cni/bin" "confDir" "/var/snap/microk8s/current/args/cni-network")
  "minikube" (dict "netnsDir" "/var/run/docker/netns")
}}
{{- range $key, $value := index $platforms .Values.platform | default dict }}{{ $_ := set $paths $key $value }}{{ end }}
{{- range $key, $value := .Values.node.cni }}
{{- if not (or (kindIs "invalid" $value) (eq (toString $value) "")) }}{{ $_ := set $paths $key $value }}{{ end }}
{{- end }}
{{- toYaml $paths }}
{{- end }}
