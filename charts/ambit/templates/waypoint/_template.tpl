{{/* Parts of the manifests of every waypoint, which the control plane merges into its own. */}}
{{- define "ambit.waypoint" -}}
{{- $waypoint := .Values.waypoint }}
{{- $settings := dict
  "CLUSTER_ID" .Values.clusterId
  "NETWORK" .Values.network
  "XDS_ADDRESS" (printf "ambit-control.%s.svc:15012" .Release.Namespace)
  "AMBIT_WAYPOINT_CONTROL_PLANE_SERVER_NAME" (printf "ambit-control.%s.svc" .Release.Namespace)
  "AMBIT_WAYPOINT_WORKLOAD_ROOT" "/var/run/secrets/istio/root-cert.pem"
  "AMBIT_WAYPOINT_TRUST_DOMAIN" .Values.trustDomain
  "AMBIT_WAYPOINT_TRUST_DOMAIN_ALIASES" (join "," .Values.trustDomainAliases)
  "AMBIT_WAYPOINT_LISTEN_ADDRESS" (printf "%s:15008" .Values.listenAddress)
  "AMBIT_WAYPOINT_METRICS_ADDRESS" (printf "%s:15020" .Values.listenAddress)
  "AMBIT_WAYPOINT_READINESS_ADDRESS" (printf "%s:15021" .Values.listenAddress)
  "AMBIT_WAYPOINT_LOG_LEVEL" .Values.logLevel
  "AMBIT_WAYPOINT_LOG_FORMAT" .Values.logFormat
  "AMBIT_WAYPOINT_ACCESS_LOG_FORMAT" .Values.logFormat
-}}
deployment:
  metadata:
    labels: {{- toYaml $waypoint.labels | nindent 6 }}
    annotations: {{- toYaml $waypoint.annotations | nindent 6 }}
  spec:
    {{- if not $waypoint.autoscaling.enabled }}
    replicas: {{ $waypoint.replicas }}
    {{- end }}
    template:
      metadata:
        labels:
          app.kubernetes.io/part-of: ambit
          {{- with $waypoint.labels }}{{ toYaml . | nindent 10 }}{{ end }}
        annotations:
          {{- with include "ambit.scrape" (list . 15020) | trim }}{{ . | nindent 10 }}{{ end }}
          {{- with $waypoint.annotations }}{{ toYaml . | nindent 10 }}{{ end }}
      spec:
        {{- with include "ambit.pullSecrets" . | trim }}{{ . | nindent 8 }}{{ end }}
        {{- include "ambit.placement" $waypoint | nindent 8 }}
        terminationGracePeriodSeconds: {{ $waypoint.terminationGracePeriodSeconds }}
        topologySpreadConstraints:
          {{- if $waypoint.topologySpreadConstraints }}
          {{- toYaml $waypoint.topologySpreadConstraints | nindent 10 }}
          {{- else }}
          {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
          - maxSkew: 1
            topologyKey: {{ . }}
            whenUnsatisfiable: ScheduleAnyway
            matchLabelKeys: [gateway.networking.k8s.io/gateway-name]
            labelSelector:
              matchExpressions:
                - { key: gateway.istio.io/managed, operator: Exists }
          {{- end }}
          {{- end }}
        securityContext:
          runAsNonRoot: true
          seccompProfile:
            type: RuntimeDefault
        containers:
          - name: waypoint
            image: {{ include "ambit.image" (list . $waypoint) }}
            imagePullPolicy: {{ .Values.image.pullPolicy }}
            env:
              {{- include "ambit.env" (mergeOverwrite $settings $waypoint.env) | trim | nindent 14 }}
            {{- with $waypoint.resources }}
            resources: {{- toYaml . | nindent 14 }}
            {{- end }}
            securityContext:
              allowPrivilegeEscalation: false
              readOnlyRootFilesystem: true
              capabilities:
                drop: [ALL]
{{- if $waypoint.podDisruptionBudget.enabled }}
podDisruptionBudget:
  spec:
    maxUnavailable: {{ $waypoint.podDisruptionBudget.maxUnavailable }}
    unhealthyPodEvictionPolicy: AlwaysAllow
{{- end }}
{{- if $waypoint.autoscaling.enabled }}
horizontalPodAutoscaler:
  spec:
    minReplicas: {{ $waypoint.autoscaling.minReplicas }}
    maxReplicas: {{ $waypoint.autoscaling.maxReplicas }}
    metrics:
      - type: Resource
        resource:
          name: cpu
          target:
            type: Utilization
            averageUtilization: {{ $waypoint.autoscaling.targetCPUUtilizationPercentage }}
{{- end }}
{{- end }}
