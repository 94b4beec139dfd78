{{- define "clasp.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "clasp.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{ include "clasp.selector" . }}
{{- end }}

{{- define "clasp.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* What cannot work is refused before anything is there. */}}
{{- define "clasp.check" -}}
{{- if eq .Values.mode "single" }}
{{- if or (gt (int .Values.api.replicas) 1) .Values.api.autoscaling.enabled }}
{{- fail "mode=single keeps its catalogue in SQLite, on a volume of one pod: api.replicas must be 1, without api.autoscaling. For several replicas take mode=scaled, with PostgreSQL (database.existingSecret) and an S3 store (audioStore.url)." }}
{{- end }}
{{- if ne .Values.worker.autoscaling.kind "none" }}
{{- fail "mode=single has its workers in the one pod: worker.autoscaling.kind must be none. Take mode=scaled to scale workers." }}
{{- end }}
{{- if or .Values.database.existingSecret .Values.audioStore.url }}
{{- fail "database and audioStore are for mode=scaled; mode=single keeps everything on its own volume." }}
{{- end }}
{{- else }}
{{- if not .Values.database.existingSecret }}
{{- fail "mode=scaled needs PostgreSQL: replicas cannot share a SQLite file. Name the secret that has CLASP_DATABASE_URL in database.existingSecret." }}
{{- end }}
{{- if not .Values.audioStore.url }}
{{- fail "mode=scaled needs an S3 store: pods share no disk, so a worker could not read what a replica received. Set audioStore.url to s3://bucket/prefix." }}
{{- end }}
{{- end }}
{{- if and (eq .Values.worker.autoscaling.kind "keda") (not .Values.worker.autoscaling.prometheus) }}
{{- fail "worker.autoscaling.kind=keda needs the address of Prometheus in worker.autoscaling.prometheus." }}
{{- end }}
{{- if not (or .Values.apiKeys.existingSecret .Values.allowAnonymous) }}
{{- fail "Other pods reach the service, so it wants a key: name the secret that has CLASP_API_KEYS in apiKeys.existingSecret, or set allowAnonymous where something in front checks." }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) }}
{{- fail "ingress.enabled needs ingress.host." }}
{{- end }}
{{- if and .Values.ingress.enabled .Values.networkPolicy.enabled (not .Values.networkPolicy.from) }}
{{- fail "ingress.enabled with networkPolicy.enabled: name the ingress controller's namespace in networkPolicy.from, which may not reach the pods otherwise." }}
{{- end }}
{{- end }}

{{/* Environment of every container of ours; `dict "root" $ "gpu" N`. */}}
{{- define "clasp.env" -}}
{{- $v := .root.Values -}}
- name: CLASP_MODEL
  value: {{ $v.model | quote }}
- name: CLASP_DEVICE
  value: {{ ternary "cuda" "cpu" (gt (int .gpu) 0) }}
{{- if $v.models.existingClaim }}
- name: CLASP_MODELS_DIR
  value: /models
{{- end }}
{{- if $v.allowAnonymous }}
- name: CLASP_ALLOW_ANONYMOUS
  value: "true"
{{- end }}
{{- if eq $v.mode "scaled" }}
- name: CLASP_VECTOR_STORE
  value: {{ $v.vectorStore.url | default "faiss" | quote }}
- name: CLASP_AUDIO_STORE
  value: {{ $v.audioStore.url | quote }}
- name: AWS_DEFAULT_REGION
  value: {{ $v.audioStore.region | quote }}
{{- if $v.audioStore.endpoint }}
- name: CLASP_S3_ENDPOINT
  value: {{ $v.audioStore.endpoint | quote }}
{{- end }}
- name: CLASP_DATABASE_URL
  valueFrom: {secretKeyRef: {name: {{ $v.database.existingSecret }}, key: CLASP_DATABASE_URL}}
{{- if $v.vectorStore.existingSecret }}
- name: CLASP_VECTOR_STORE_TOKEN
  valueFrom: {secretKeyRef: {name: {{ $v.vectorStore.existingSecret }}, key: CLASP_VECTOR_STORE_TOKEN}}
{{- end }}
{{- if $v.audioStore.existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ $v.audioStore.existingSecret }}, key: AWS_ACCESS_KEY_ID}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ $v.audioStore.existingSecret }}, key: AWS_SECRET_ACCESS_KEY}}
{{- end }}
{{- end }}
{{- if $v.apiKeys.existingSecret }}
- name: CLASP_API_KEYS
  valueFrom: {secretKeyRef: {name: {{ $v.apiKeys.existingSecret }}, key: CLASP_API_KEYS}}
{{- end }}
{{- range $name, $value := $v.settings }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "clasp.image" -}}
image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  readOnlyRootFilesystem: true
  allowPrivilegeEscalation: false
  capabilities: {drop: [ALL]}
{{- end }}

{{/* `dict "resources" R "gpu" N` */}}
{{- define "clasp.resources" -}}
{{- $r := deepCopy .resources -}}
{{- if gt (int .gpu) 0 }}
{{- $_ := set $r "limits" (merge (dict "nvidia.com/gpu" (toString .gpu)) ($r.limits | default dict)) }}
{{- end }}
{{- toYaml $r }}
{{- end }}

{{/* What all pods of ours have in common; `dict "root" $ "part" P` */}}
{{- define "clasp.pod" -}}
serviceAccountName: {{ include "clasp.name" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .part.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "clasp.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: data, mountPath: /data}
{{- if .Values.models.existingClaim }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{- define "clasp.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: 4Gi}
{{- if .Values.models.existingClaim }}
- name: models
  persistentVolumeClaim: {claimName: {{ .Values.models.existingClaim }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "clasp.probes" -}}
# models are loaded, and the index is read, before it is ready
startupProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 5
  failureThreshold: 120
readinessProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 1
livenessProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}
