{{/* Names and labels. One release per namespace is usual; the name of the release tells several apart. */}}
{{- define "afterimage.name" -}}
{{- if contains "afterimage" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-afterimage" (.Release.Name | trunc 29) }}{{ end }}
{{- end }}

{{- define "afterimage.selector" -}}
app.kubernetes.io/name: afterimage
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "afterimage.labels" -}}
{{ include "afterimage.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* A generator with the defaults that it does not set. dict root, generator -> YAML */}}
{{- define "afterimage.generator" -}}
{{- mergeOverwrite (deepCopy .root.Values.generatorDefaults) .generator | toYaml }}
{{- end }}

{{/* Name of a generator as a part of the name of a resource. */}}
{{- define "afterimage.slug" -}}
{{- . | lower | replace "." "-" | replace "_" "-" | trunc 30 | trimSuffix "-" }}
{{- end }}

{{/* The image of a kind: api, worker or flower. dict root, image */}}
{{- define "afterimage.image" -}}
{{- $images := .root.Values.images }}
{{- printf "%s%s:%s" $images.registry (get $images .image) ($images.tag | default .root.Chart.AppVersion) }}
{{- end }}

{{/*
Where secrets are mounted. Not below /run/secrets: there the cloud mounts the token of a service account, and a read-only
volume has no room for it. Flower, which has no service account, reads its password there.
*/}}
{{- define "afterimage.secretsFolder" -}}
{{- eq . "flower" | ternary "/run/secrets" "/etc/afterimage-secrets" }}
{{- end }}

{{/* Environment of every process. The hook `migrate` has no settings file, because it runs before the release exists. */}}
{{- define "afterimage.environment" -}}
- {name: AFTERIMAGE_ENVIRONMENT, value: production}
- {name: AFTERIMAGE_SECURITY__REQUIRE_API_KEYS, value: "true"}
- {name: AFTERIMAGE_STORAGE__URL, value: {{ .Values.storage.url | default "file:///data/blobs" | quote }}}
{{- range $name, $value := .Values.settings }}
- {name: {{ $name }}, value: {{ $value | toString | quote }}}
{{- end }}
{{- end }}

{{- define "afterimage.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
# A large volume of blobs is not walked at each start.
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "afterimage.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Files of secrets. dict root, secrets: names of .Values.secrets. Flower and `migrate` get no other ones. */}}
{{- define "afterimage.secretsVolume" -}}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      {{- $root := .root }}
      {{- range .secrets }}
      {{- $secret := get $root.Values.secrets . }}
      {{- if $secret.name }}
      - secret: {name: {{ $secret.name }}, items: [{key: {{ $secret.key }}, path: {{ get (include "afterimage.secretFiles" $root | fromYaml) . }}}]}
      {{- end }}
      {{- end }}
      {{- range (ternary $root.Values.extraSecrets list (has "cache" .secrets)) }}
      - secret: {name: {{ .name }}, items: [{key: {{ .key }}, path: {{ .setting }}}]}
      {{- end }}
{{- end }}

{{/* The file of each secret: the name of its setting. */}}
{{- define "afterimage.secretFiles" -}}
database: afterimage_database__url
migrations: afterimage_database__url
queue: afterimage_queue__url
cache: afterimage_cache__url
signingKeys: afterimage_security__signing_keys
storageOptions: afterimage_storage__options
flowerAuth: flower_auth
{{- end }}

{{/*
A Deployment. dict:
  root, component, name (the suffix), image (api, worker, flower), command, secrets
  values      replicas, resources, nodeSelector, tolerations, gpus
  environment YAML, more variables
  ports, probes, lifecycle   YAML
  grace       seconds
  scaled      true where an autoscaler sets the replicas
  files       true for processes that read and write blobs
  models      true for processes that load models
*/}}
{{- define "afterimage.deployment" -}}
{{- $root := .root }}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "afterimage.name" $root }}-{{ .name }}
  labels:
    {{- include "afterimage.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
spec:
  {{- if not .scaled }}
  replicas: {{ .values.replicas | default 1 }}
  {{- end }}
  revisionHistoryLimit: 3
  strategy:
    # A process with a GPU ends before its successor starts, because the successor needs its GPU.
    rollingUpdate: {{ if .values.gpus }}{maxSurge: 0, maxUnavailable: 1}{{ else }}{maxSurge: 1, maxUnavailable: 0}{{ end }}
  selector:
    matchLabels:
      {{- include "afterimage.selector" $root | nindent 6 }}
      app.kubernetes.io/component: {{ .component }}
      afterimage/process: {{ .name }}
  template:
    metadata:
      labels:
        {{- include "afterimage.labels" $root | nindent 8 }}
        app.kubernetes.io/component: {{ .component }}
        afterimage/process: {{ .name }}
      annotations:
        checksum/config: {{ $root.Values.config | toJson | sha256sum }}
    spec:
      {{- if and .files $root.Values.serviceAccount.create }}
      serviceAccountName: {{ include "afterimage.name" $root }}
      {{- end }}
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: {{ .grace }}
      securityContext: {{- include "afterimage.podSecurity" $root | nindent 8 }}
      {{- with $root.Values.images.pullSecrets }}
      imagePullSecrets:
        {{- range . }}
        - {name: {{ . }}}
        {{- end }}
      {{- end }}
      {{- if and .values.gpus $root.Values.gpuRuntimeClass }}
      runtimeClassName: {{ $root.Values.gpuRuntimeClass }}
      {{- end }}
      {{- with .values.nodeSelector }}
      nodeSelector: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with concat (.values.tolerations | default list) (ternary $root.Values.gpuTolerations list (gt (int .values.gpus) 0)) }}
      tolerations: {{- toYaml . | nindent 8 }}
      {{- end }}
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              {{- include "afterimage.selector" $root | nindent 14 }}
              afterimage/process: {{ .name }}
      containers:
        - name: {{ .component }}
          image: {{ include "afterimage.image" . | quote }}
          imagePullPolicy: {{ $root.Values.images.pullPolicy }}
          command: {{ .command | toJson }}
          env:
            {{- include "afterimage.environment" $root | nindent 12 }}
            - {name: AFTERIMAGE_SECRETS_DIR, value: {{ include "afterimage.secretsFolder" .component }}}
            - {name: AFTERIMAGE_CONFIG_FILE, value: /etc/afterimage/afterimage.toml}
            {{- .environment | nindent 12 }}
            {{- if .models }}
            # Models with a hub id are downloaded here.
            - {name: HF_HOME, value: /models}
            {{- end }}
          ports: {{- .ports | nindent 12 }}
          {{- .probes | nindent 10 }}
          {{- with .lifecycle }}
          lifecycle: {{ . }}
          {{- end }}
          {{- $resources := deepCopy .values.resources }}
          {{- if .values.gpus }}
          {{- $_ := set $resources "limits" (merge (dict "nvidia.com/gpu" .values.gpus) ($resources.limits | default dict)) }}
          {{- end }}
          resources: {{- toYaml $resources | nindent 12 }}
          securityContext: {{- include "afterimage.containerSecurity" $root | nindent 12 }}
          volumeMounts:
            - {name: tmp, mountPath: /tmp}
            - {name: secrets, mountPath: {{ include "afterimage.secretsFolder" .component }}, readOnly: true}
            - {name: config, mountPath: /etc/afterimage, readOnly: true}
            {{- if $root.Values.tlsSecret }}
            - {name: tls, mountPath: /etc/afterimage-tls, readOnly: true}
            {{- end }}
            {{- if .files }}
            - {name: data, mountPath: /data}
            {{- end }}
            {{- if .models }}
            - {name: models, mountPath: /models}
            {{- end }}
      volumes:
        - {name: tmp, emptyDir: {sizeLimit: 1Gi}}
        {{- include "afterimage.secretsVolume" . | nindent 8 }}
        - {name: config, configMap: {name: {{ include "afterimage.name" $root }}}}
        {{- if $root.Values.tlsSecret }}
        - {name: tls, secret: {secretName: {{ $root.Values.tlsSecret }}, defaultMode: 0440}}
        {{- end }}
        {{- if .files }}
        {{- if $root.Values.storage.url }}
        - {name: data, emptyDir: {}}
        {{- else }}
        - {name: data, persistentVolumeClaim: {claimName: {{ $root.Values.storage.volume.existingClaim | default (printf "%s-blobs" (include "afterimage.name" $root)) }}}}
        {{- end }}
        {{- end }}
        {{- if .models }}
        {{- if $root.Values.modelCache.enabled }}
        - {name: models, persistentVolumeClaim: {claimName: {{ $root.Values.modelCache.existingClaim | default (printf "%s-models" (include "afterimage.name" $root)) }}}}
        {{- else }}
        - {name: models, emptyDir: {}}
        {{- end }}
        {{- end }}
{{- end }}

{{/* Variables, ports and probes of a worker or the reconciler. The probes take a dict: loadSeconds */}}
{{- define "afterimage.workerEnvironment" -}}
- {name: AFTERIMAGE_METRICS__HOST, value: 0.0.0.0}
- {name: AFTERIMAGE_METRICS__PORT, value: "9100"}
{{- end }}

{{- define "afterimage.workerPorts" -}}
- {name: metrics, containerPort: 9100}
{{- end }}

{{- define "afterimage.workerProbes" -}}
# Ready when its models are loaded and it writes its heartbeat. The time of the start-up probe is for loading.
startupProbe: {httpGet: {path: /ready, port: metrics}, periodSeconds: 5, timeoutSeconds: 5, failureThreshold: {{ div (int .loadSeconds) 5 }}}
readinessProbe: {httpGet: {path: /ready, port: metrics}, periodSeconds: 15, timeoutSeconds: 10, failureThreshold: 4}
# A process that waits for a server is not ready, but answers here. One that gives no answer for two minutes is started again.
livenessProbe: {httpGet: {path: /metrics, port: metrics}, periodSeconds: 15, timeoutSeconds: 10, failureThreshold: 8}
{{- end }}

{{- define "afterimage.volumeClaim" -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ include "afterimage.name" .root }}-{{ .name }}
  labels: {{- include "afterimage.labels" .root | nindent 4 }}
  # Neither an upgrade nor an uninstall deletes the data.
  annotations: {helm.sh/resource-policy: keep}
spec:
  accessModes: {{ .volume.accessModes | toJson }}
  {{- with .volume.storageClass }}
  storageClassName: {{ . }}
  {{- end }}
  resources: {requests: {storage: {{ .volume.size }}}}
{{- end }}
