// Updates pages in place. Without this script every link and form still works, and loads whole pages.

const JOB_EVENTS = ["queued", "started", "resolved", "degraded", "moderated", "requeued", "succeeded", "failed", "canceled", "expired", "dead"];
// A browser opens at most six connections to a host, for all its pages together. Streams must leave some free.
const MAX_STREAMS = 2;
const TYPING_PAUSE_MS = 350;
const RETRY_MS = 2500;
const PLAN_FIELDS = ["prompt", "concepts", "avoid", "avoid_ids", "model", "collection", "min_similarity", "similar_examples_count", "filter"];

async function fetchPart(address, options = {}) {
  try {
    const response = await fetch(address, { ...options, headers: { "X-Fragment": "1" } });
    if (response.status === 401) location.assign(new URL("../sign-in", import.meta.url));
    const retryMs = Math.max(RETRY_MS, 1000 * Number(response.headers.get("Retry-After") ?? 0));
    return { ok: response.ok, gone: [404, 410].includes(response.status), html: await response.text(), retryMs };
  } catch {
    return { ok: false, html: '<p class="wrong" role="alert">The service does not answer.</p>', retryMs: RETRY_MS };
  }
}

function parseHtml(html) {
  const template = document.createElement("template");
  template.innerHTML = html.trim();
  return template.content;
}

// --- jobs ---------------------------------------------------------------------------------------------------------

let streams = 0;

// Keeps a job's card up to date until the job has ended: by its event stream, or by polling if all streams are in use.
function followJob(job) {
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
    job.querySelector("[data-step]").textContent = `step ${step} of ${total_steps}`;
  });
  stream.addEventListener("preview", ({ data }) => {
    const { index, image } = JSON.parse(data);
    const shown = job.querySelector("[data-previews]");
    while (shown.children.length <= index) shown.append(Object.assign(new Image(), { alt: "a preview" }));
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

// --- forms --------------------------------------------------------------------------------------------------------

function submitInto(form, target) {
  form.addEventListener("submit", async (event) => {
    if (event.submitter?.formMethod === "get") return;
    event.preventDefault();
    event.submitter.disabled = true;
    const { ok, html } = await fetchPart(form.action, { method: "POST", body: new FormData(form) });
    event.submitter.disabled = false;
    form.querySelector(":scope > .wrong")?.remove();
    const fragment = parseHtml(html);
    if (!ok) return form.append(fragment); // `once` stays, so a retry makes no second job if the service accepted this one
    form.elements.once.value = crypto.getRandomValues(new Uint32Array(4)).join("-");
    document.querySelector("[data-empty]")?.remove();
    const job = fragment.firstElementChild;
    target.prepend(fragment);
    followJob(job);
  });
}

// One request at a time: while a request waits for an embed worker, further letters do not send more requests.
function updatePlanAsTyped(form, shown) {
  let timer, isRequesting = false, hasChanged = false;
  const update = async () => {
    if (isRequesting) return void (hasChanged = true);
    isRequesting = true;
    const sent = [...new FormData(form)].filter(([name]) => name === "pin" || name.startsWith("weight.") || PLAN_FIELDS.includes(name));
    const { ok, html } = await fetchPart(`${form.dataset.asTyped}?${new URLSearchParams(sent)}`);
    isRequesting = false;
    if (hasChanged) {
      hasChanged = false;
      return update();
    }
    shown.querySelector(":scope > .wrong")?.remove();
    if (ok) shown.replaceChildren(parseHtml(html));
    else shown.prepend(parseHtml(html)); // the choices stay
  };
  form.addEventListener("input", ({ target }) => {
    if (!PLAN_FIELDS.includes(target.name)) return;
    clearTimeout(timer);
    timer = setTimeout(update, TYPING_PAUSE_MS);
  });
}

// --- everything on this page --------------------------------------------------------------------------------------

for (const job of document.querySelectorAll("[data-events]")) followJob(job);

for (const button of document.querySelectorAll("[data-without-script]")) button.hidden = true;

for (const form of document.querySelectorAll("form[data-into]")) {
  submitInto(form, document.getElementById(form.dataset.into));
  updatePlanAsTyped(form, document.getElementById("references"));
}

for (const form of document.querySelectorAll("form[data-sure]")) {
  form.addEventListener("submit", (event) => confirm(form.dataset.sure) || event.preventDefault());
}

for (const live of document.querySelectorAll("[data-every]")) {
  const refresh = async () => {
    if (!document.hidden && !live.contains(document.activeElement)) {
      const { ok, html } = await fetchPart(live.dataset.part);
      if (ok && !live.contains(document.activeElement)) live.replaceChildren(parseHtml(html));
    }
    setTimeout(refresh, Number(live.dataset.every));
  };
  setTimeout(refresh, Number(live.dataset.every));
}
