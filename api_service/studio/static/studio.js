// Spares leaving a page. Without this script every link and form still works, by whole pages.

const NEWS = ["queued", "started", "resolved", "degraded", "moderated", "requeued", "succeeded", "failed", "canceled", "expired", "dead"];
// A browser keeps six connections to a host, for all its pages together: one stream each must leave some.
const MOST_STREAMS = 2;
const TYPING_MS = 350;
const AGAIN_MS = 2500;
const DECIDES_THE_PLAN = ["prompt", "model", "collection", "min_similarity", "similar_examples_count"];

async function part(address, options = {}) {
  try {
    const answer = await fetch(address, { ...options, headers: { "X-Fragment": "1" } });
    if (answer.status === 401) location.assign("/sign-in");
    const againMs = Math.max(AGAIN_MS, 1000 * Number(answer.headers.get("Retry-After") ?? 0));
    return { ok: answer.ok, gone: [404, 410].includes(answer.status), html: await answer.text(), againMs };
  } catch {
    return { ok: false, html: '<p class="wrong" role="alert">The service does not answer.</p>', againMs: AGAIN_MS };
  }
}

function elements(html) {
  const template = document.createElement("template");
  template.innerHTML = html.trim();
  return template.content;
}

// --- jobs ---------------------------------------------------------------------------------------------------------

let streams = 0;

// Keeps a job's card up to date until the job has ended: by its events, or where others have the streams by asking.
function follow(job) {
  if (!job.dataset.events) return;
  if (streams >= MOST_STREAMS) return setTimeout(renew, AGAIN_MS, job);
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
  for (const name of NEWS) stream.addEventListener(name, () => { close(); renew(job); });
  stream.onerror = () => { close(); setTimeout(renew, AGAIN_MS, job); };
}

async function renew(job) {
  const { ok, gone, html, againMs } = await part(job.dataset.part);
  if (!job.isConnected) return;
  if (gone) return job.remove();
  if (!ok) return setTimeout(renew, againMs, job);
  const fresh = elements(html).firstElementChild;
  const kept = fresh.querySelector("[data-previews]");
  if (!kept && job.closest("[data-reload]")) return location.reload();
  kept?.replaceChildren(...job.querySelector("[data-previews]").children);
  job.replaceWith(fresh);
  follow(fresh);
}

// --- forms --------------------------------------------------------------------------------------------------------

function sendInto(form, target) {
  form.addEventListener("submit", async (event) => {
    if (event.submitter?.formMethod === "get") return;
    event.preventDefault();
    event.submitter.disabled = true;
    const { ok, html } = await part(form.action, { method: "POST", body: new FormData(form) });
    event.submitter.disabled = false;
    form.querySelector(":scope > .wrong")?.remove();
    const made = elements(html);
    if (!ok) return form.append(made); // with the same `once`, so that what was accepted unheard is not made twice
    form.elements.once.value = crypto.getRandomValues(new Uint32Array(4)).join("-");
    document.querySelector("[data-empty]")?.remove();
    const job = made.firstElementChild;
    target.prepend(made);
    follow(job);
  });
}

// One question at a time: one that waits for a worker that is away must not be joined by one for every letter typed.
function askAsTyped(form, shown) {
  let timer, asking = false, again = false;
  const ask = async () => {
    if (asking) return void (again = true);
    asking = true;
    const sent = [...new FormData(form)].filter(([name]) => name === "pin" || DECIDES_THE_PLAN.includes(name));
    const { ok, html } = await part(`${form.dataset.asTyped}?${new URLSearchParams(sent)}`);
    asking = false;
    if (again) {
      again = false;
      return ask();
    }
    shown.querySelector(":scope > .wrong")?.remove();
    if (ok) shown.replaceChildren(elements(html));
    else shown.prepend(elements(html)); // what was chosen stays
  };
  form.addEventListener("input", ({ target }) => {
    if (!DECIDES_THE_PLAN.includes(target.name)) return;
    clearTimeout(timer);
    timer = setTimeout(ask, TYPING_MS);
  });
}

// --- everything on this page --------------------------------------------------------------------------------------

for (const job of document.querySelectorAll("[data-events]")) follow(job);

for (const button of document.querySelectorAll("[data-without-script]")) button.hidden = true;

for (const form of document.querySelectorAll("form[data-into]")) {
  sendInto(form, document.getElementById(form.dataset.into));
  askAsTyped(form, document.getElementById("references"));
}

for (const form of document.querySelectorAll("form[data-sure]")) {
  form.addEventListener("submit", (event) => confirm(form.dataset.sure) || event.preventDefault());
}

for (const live of document.querySelectorAll("[data-every]")) {
  const look = async () => {
    if (!document.hidden && !live.contains(document.activeElement)) {
      const { ok, html } = await part(live.dataset.part);
      if (ok && !live.contains(document.activeElement)) live.replaceChildren(elements(html));
    }
    setTimeout(look, Number(live.dataset.every));
  };
  setTimeout(look, Number(live.dataset.every));
}
