#!/bin/sh
# Write Alertmanager's configuration from the environment, then start it. It cannot read variables itself.
#
# ALERT_EMAIL_TO with ALERT_SMTP (host:port) sends mail, ALERT_WEBHOOK_URL calls a webhook. Both may be set. Without
# them, alerts are shown in Alertmanager and Prometheus only.
set -eu
configuration=${TMPDIR:-/tmp}/alertmanager.yml
{
    cat <<'YAML'
route:
  receiver: operators
  group_by: [alertname]
  group_wait: 10s
  group_interval: 1m
  repeat_interval: 12h
inhibit_rules:
  # Without a database, other alerts follow. They are not sent beside it.
  - source_matchers: [alertname="ComponentDown", component="database"]
    target_matchers: [severity="ticket"]
receivers:
  - name: operators
YAML
    if [ -n "${ALERT_EMAIL_TO:-}" ]; then
        cat <<YAML
    email_configs:
      - to: '$ALERT_EMAIL_TO'
        from: '${ALERT_EMAIL_FROM:-$ALERT_EMAIL_TO}'
        smarthost: '$ALERT_SMTP'
        send_resolved: true
        require_tls: ${ALERT_SMTP_TLS:-true}
YAML
        if [ -n "${ALERT_SMTP_USER:-}" ]; then
            cat <<YAML
        auth_username: '$ALERT_SMTP_USER'
        auth_password_file: /run/secrets/alert_smtp_password
YAML
        fi
    fi
    if [ -n "${ALERT_WEBHOOK_URL:-}" ]; then
        cat <<YAML
    webhook_configs:
      - url: '$ALERT_WEBHOOK_URL'
        send_resolved: true
YAML
    fi
} >"$configuration"
exec "${ALERTMANAGER:-alertmanager}" --config.file="$configuration" --storage.path="${ALERTMANAGER_DATA:-/alertmanager}" "$@"
