{{- define "bonsai-lora.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "bonsai-lora.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "bonsai-lora.labels" -}}
{{ include "bonsai-lora.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "bonsai-lora.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "bonsai-lora.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "bonsai-lora.claim" -}}
{{- .Values.store.volume.existingClaim | default (include "bonsai-lora.fullname" .) -}}
{{- end -}}

{{/* A value without the exponent that Helm gives large numbers. */}}
{{- define "bonsai-lora.plain" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}

{{/* Refuses what would start and then lose or expose something. */}}
{{- define "bonsai-lora.check" -}}
{{- if not .Values.store.bucket -}}
{{- if gt (int .Values.replicas) 1 -}}
{{- fail (printf "replicas is %d, but a store on a volume belongs to one pod; set store.bucket, or replicas: 1 and more workers" (int .Values.replicas)) -}}
{{- end -}}
{{- if .Values.autoscaling.enabled -}}
{{- fail "autoscaling adds replicas, but a store on a volume belongs to one pod; set store.bucket" -}}
{{- end -}}
{{- end -}}
{{- if and (not .Values.access.keysSecret) (not .Values.access.noAuth) -}}
{{- fail "nobody would need a key; set access.keysSecret, or access.noAuth: true if networkPolicy.from admits only callers that may do everything" -}}
{{- end -}}
{{- if and .Values.access.keysSecret .Values.access.noAuth -}}
{{- fail "access.keysSecret and access.noAuth contradict each other; set one" -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled .Values.access.keysSecret (not .Values.serviceMonitor.keySecret) -}}
{{- fail "/metrics needs a key of scope admin; set serviceMonitor.keySecret" -}}
{{- end -}}
{{- end -}}
