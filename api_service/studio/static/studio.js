// Updates pages in place. Without this script every link and form still works, and loads whole pages.

const JOB_EVENTS = ["queued", "started", "resolved", "degraded", "moderated", "requeued", "succeeded", "failed", "canceled", "expired", "dead"];
// A browser opens at most six connections to a host, for all its pages together. Streams must leave some free.
const MAX_STREAMS = 2;
export const RETRY_MS = 2500;

// --- texts --------------------------------------------------------------------------------------------------------

// A text of the template `script_texts.html` in the reader's language, with its values.
const texts = JSON.parse(document.querySelector("meta[name=texts]").content);
export const text = (name, values = {}) => texts[name].replace(/\{(\w+)\}/g, (_, value) => values[value]);

// --- the service --------------------------------------------------------------------------------------------------

const offline = document.querySelector("[data-offline]");

export async function fetchPart(address, options = {}) {
  try {
    const response = await fetch(address, { ...options, headers: { "X-Fragment": "1" } });
    if (response.status === 401) location.assign(new URL("../sign-in", import.meta.url));
    offline.hidden = true;
    const retryMs = Math.max(RETRY_MS, 1000 * Number(response.headers.get("Retry-After") ?? 0));
    return { ok: response.ok, status: response.status, gone: [404, 410].includes(response.status), html: await response.text(), retryMs };
  } catch {
    offline.hidden = false;
    return { ok: false, html: `<p class="wrong" role="alert">${text("unreachable")}</p>`, retryMs: RETRY_MS };
  }
}

export function parseHtml(html) {
  const template = document.createElement("template");
  template.innerHTML = html.trim();
  return finish(template.content);
}

// --- what a page without script leaves out ------------------------------------------------------------------------

const MOMENT = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
const CLOCK = new Intl.DateTimeFormat(undefined, { timeStyle: "short" });

// To format a moment takes 50 microseconds. Images of a job, and many of a bulk, have the same minute.
const moments = new Map();

function inWords(time) {
  const today = "short" in time.dataset && new Date().toDateString();
  const minute = `${time.dateTime.slice(0, 16)} ${today}`;
  if (!moments.has(minute)) {
    const moment = new Date(time.dateTime);
    moments.set(minute, (moment.toDateString() === today ? CLOCK : MOMENT).format(moment));
  }
  return moments.get(minute);
}

document.addEventListener("pointerover", ({ target }) => {
  if (target.dateTime) target.title = new Date(target.dateTime);
});

// Shows times in the reader's zone, and buttons that need a script.
function finish(part) {
  for (const time of part.querySelectorAll("time[datetime]")) time.textContent = inWords(time);
  for (const button of part.querySelectorAll("[data-copy]")) button.hidden = false;
  return part;
}

document.addEventListener("click", async ({ target }) => {
  const copy = target.closest?.("[data-copy]");
  if (!copy) return;
  await navigator.clipboard.writeText(copy.parentElement.querySelector("pre").textContent);
  copy.textContent = text("copied");
});

document.addEventListener("submit", (event) => {
  const sure = event.submitter?.dataset.sure ?? event.target.dataset.sure;
  if (sure && !confirm(sure)) event.preventDefault();
}, true);

const themes = document.querySelector("[data-theme-switch]");
themes.hidden = false;
const nameTheme = () => themes.textContent = text(`theme_${document.documentElement.dataset.theme ?? "auto"}`);
nameTheme();
themes.addEventListener("click", () => {
  const root = document.documentElement;
  const next = { undefined: "dark", dark: "light", light: "" }[root.dataset.theme];
  if (next) root.dataset.theme = next;
  else delete root.dataset.theme;
  const path = new URL("..", import.meta.url).pathname;
  document.cookie = `theme=${next}; path=${path}; max-age=${next ? 31536000 : 0}; samesite=lax`;
  nameTheme();
});

// --- jobs ---------------------------------------------------------------------------------------------------------

let streams = 0;

// Keeps a job's card up to date until the job has ended: by its event stream, or by polling if all streams are in use.
export function followJob(job) {
  if (!job.dataset.events) return;
  if (streams >= MAX_STREAMS) return setTimeout(refreshJob, RETRY_MS, job);
  const stream = new EventSource(job.dataset.events);
  streams += 1;
  let open = true;
  const close = () => {
    if (!open) return;
    open = false;
    stream.close();
    streams -= 1;
  };
  stream.addEventListener("progress", ({ data }) => {
    const { step, total_steps } = JSON.parse(data);
    Object.assign(job.querySelector("progress"), { max: total_steps, value: step });
    job.querySelector("[data-step]").textContent = text("step", { step, total: total_steps });
    const state = job.querySelector("[data-state]");
    if (state && state.textContent !== text("drawing")) state.textContent = text("drawing");
  });
  stream.addEventListener("preview", ({ data }) => {
    const { index, image } = JSON.parse(data);
    const shown = job.querySelector("[data-previews]");
    while (shown.children.length <= index) shown.append(Object.assign(new Image(), { alt: text("preview") }));
    shown.children[index].src = image;
  });
  for (const name of JOB_EVENTS) stream.addEventListener(name, () => { close(); refreshJob(job); });
  stream.onerror = () => { close(); setTimeout(refreshJob, RETRY_MS, job); };
}

async function refreshJob(job) {
  const { ok, gone, html, retryMs } = await fetchPart(job.dataset.part);
  if (!job.isConnected) return;
  if (gone) return job.remove();
  if (!ok) return setTimeout(refreshJob, retryMs, job);
  const fresh = parseHtml(html).firstElementChild;
  const kept = fresh.querySelector("[data-previews]");
  if (!kept && job.closest("[data-reload]")) return location.reload();
  kept?.replaceChildren(...job.querySelector("[data-previews]").children);
  job.replaceWith(fresh);
  followJob(fresh);
}

// --- parts that stay current --------------------------------------------------------------------------------------

// Replaces the part; returns whether the service answered. The focus stays: in the same row, or on the same button.
async function refreshPart(part) {
  const { ok, html } = await fetchPart(part.dataset.part || location.href);
  offline.hidden = ok;
  if (!ok) return false;
  const focused = part.contains(document.activeElement) ? document.activeElement : null;
  const place = focused?.closest("[data-job]")?.dataset.job;
  part.replaceChildren(parseHtml(html));
  const alike = (each) => each.textContent === focused.textContent && each.href === focused.href && each.form?.action === focused.form?.action;
  if (place) part.querySelector(`[data-job="${place}"] ${focused.localName}`)?.focus();
  else if (focused) [...part.querySelectorAll(focused.localName)].find(alike)?.focus();
  return true;
}

function followQueue(part) {
  const stream = new EventSource(part.dataset.live);
  stream.addEventListener("changed", () => refreshPart(part));
  stream.addEventListener("progress", ({ data }) => {
    for (const [id, { step, total_steps }] of Object.entries(JSON.parse(data))) {
      const bar = part.querySelector(`[data-job="${id}"] progress`);
      if (bar) Object.assign(bar, { max: total_steps, value: step });
    }
  });
  // The stream ends at an error. When the page can be read again, it is followed again.
  stream.onerror = () => {
    stream.close();
    setTimeout(async function again() {
      if (await refreshPart(part)) followQueue(part);
      else setTimeout(again, RETRY_MS);
    }, RETRY_MS);
  };
}

// --- everything on this page --------------------------------------------------------------------------------------

finish(document);
for (const job of document.querySelectorAll("[data-events]")) followJob(job);
for (const part of document.querySelectorAll("[data-live]")) followQueue(part);
for (const part of document.querySelectorAll("[data-every]")) {
  setInterval(() => document.hidden || refreshPart(part), Number(part.dataset.every));
}
