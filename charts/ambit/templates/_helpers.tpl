{{/* Labels of every object; takes the root and the component's name. */}}
{{- define "ambit.labels" -}}
{{- $root := index . 0 }}{{ $component := index . 1 -}}
{{ include "ambit.selector" . }}
app.kubernetes.io/part-of: ambit
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end }}

{{/* Labels by which a workload finds its pods; they never change. */}}
{{- define "ambit.selector" -}}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
{{- end }}

{{/* Labels of pods beyond those of every object: the mesh's own pods are never in the mesh. */}}
{{- define "ambit.podLabels" -}}
istio.io/dataplane-mode: none
sidecar.istio.io/inject: "false"
{{- end }}

{{/* Name of an image; takes the root and the component's values. */}}
{{- define "ambit.image" -}}
{{- $root := index . 0 }}{{ $image := (index . 1).image -}}
{{- $name := $image.repository }}
{{- with $root.Values.image.registry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end }}
{{- if $image.digest -}}
{{ $name }}@{{ $image.digest }}
{{- else -}}
{{ $name }}:{{ $image.tag | default $root.Values.image.tag | default $root.Chart.AppVersion }}
{{- end }}
{{- end }}

{{/* Where pods of a component run; takes the component's values. */}}
{{- define "ambit.placement" -}}
nodeSelector:
  kubernetes.io/os: linux
  {{- with .nodeSelector }}{{ toYaml . | nindent 2 }}{{ end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{/* Annotations by which Prometheus finds a pod; takes the root and a port. */}}
{{- define "ambit.scrape" -}}
{{- if (index . 0).Values.monitoring.scrapeAnnotations }}
prometheus.io/scrape: "true"
prometheus.io/path: /metrics
prometheus.io/port: {{ index . 1 | quote }}
{{- end }}
{{- end }}

{{/* Variables of a component by name. */}}
{{- define "ambit.env" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  {{- /* Helm reads numbers of a values file as floating-point numbers, which `quote` may write with an exponent. */}}
  value: {{ if kindIs "string" $value }}{{ $value | quote }}{{ else }}{{ $value | toJson | quote }}{{ end }}
{{- end }}
{{- end }}

{{/* Variables that say which pod and node this is. */}}
{{- define "ambit.downward" -}}
{{- range $name, $path := dict "NODE_NAME" "spec.nodeName" "POD_NAME" "metadata.name" "POD_NAMESPACE" "metadata.namespace" "INSTANCE_IP" "status.podIP" }}
- name: {{ $name }}
  valueFrom:
    fieldRef:
      fieldPath: {{ $path }}
{{- end }}
{{- end }}

{{/* Names of Secrets for the registry. */}}
{{- define "ambit.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Labels by which Kiali and other tools for Istio find the control plane. */}}
{{- define "ambit.istioLabels" -}}
{{- if .Values.istioLabels }}
app: istiod
istio.io/rev: default
{{- end }}
{{- end }}

{{/* Control pods are kept apart from each other where there are nodes enough. */}}
{{- define "ambit.control.affinity" -}}
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels: {{- include "ambit.selector" (list . "ambit-control") | nindent 12 }}
{{- end }}

{{/* SELinux type of containers that use the host's sockets and files. */}}
{{- define "ambit.seLinux" -}}
{{- if eq .Values.platform "openshift" }}
seLinuxOptions:
  type: spc_t
{{- end }}
{{- end }}

{{/* What makes an object a part of the test; takes its turn. Nothing of it stays after a test that went well. */}}
{{- define "ambit.testHook" -}}
helm.sh/hook: test
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{/* Pods of the test fit the Pod Security Standard "restricted". */}}
{{- define "ambit.testPod" -}}
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- end }}
{{- define "ambit.testContainer" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
