// Spares leaving a page. Without this script every link and form still works, by whole pages.

const NEWS = ["queued", "started", "resolved", "degraded", "moderated", "requeued", "succeeded", "failed", "canceled", "expired", "dead"];
const TYPING_MS = 350;
const AGAIN_MS = 2000;

async function part(address, options = {}) {
  const answer = await fetch(address, { ...options, headers: { "X-Fragment": "1" } });
  if (answer.status === 401) location.assign("/sign-in");
  return { ok: answer.ok, html: await answer.text() };
}

function elements(html) {
  const template = document.createElement("template");
  template.innerHTML = html.trim();
  return template.content;
}

// --- jobs ---------------------------------------------------------------------------------------------------------

function follow(job) {
  const stream = new EventSource(job.dataset.events);
  const renew = async () => {
    stream.close();
    const { ok, html } = await part(job.dataset.part).catch(() => ({ ok: false }));
    if (!job.isConnected) return;
    if (!ok) return setTimeout(renew, AGAIN_MS);
    const fresh = elements(html).firstElementChild;
    if (fresh.dataset.events) keepPreviews(job, fresh);
    job.replaceWith(fresh);
    if (fresh.dataset.events) follow(fresh);
  };
  const later = () => { stream.close(); setTimeout(renew, AGAIN_MS); };

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
  for (const name of NEWS) stream.addEventListener(name, renew);
  stream.onerror = later;
}

function keepPreviews(old, fresh) {
  fresh.querySelector("[data-previews]").replaceChildren(...old.querySelector("[data-previews]").children);
}

// --- forms --------------------------------------------------------------------------------------------------------

function sendInto(form, target) {
  form.addEventListener("submit", async (event) => {
    if (event.submitter?.formMethod === "get") return;
    event.preventDefault();
    form.querySelector(".wrong")?.remove();
    event.submitter.disabled = true;
    try {
      const { ok, html } = await part(form.action, { method: "POST", body: new FormData(form) });
      const made = elements(html);
      if (!ok) return form.append(made);
      document.querySelector("[data-empty]")?.remove();
      const job = made.firstElementChild;
      target.prepend(made);
      if (job.dataset.events) follow(job);
    } catch {
      form.append(elements('<p class="wrong" role="alert">The service does not answer.</p>'));
    } finally {
      event.submitter.disabled = false;
    }
  });
}

function askAsTyped(form, shown) {
  let timer, latest = 0;
  const ask = async () => {
    const mine = ++latest;
    const { html } = await part(`${form.dataset.asTyped}?${new URLSearchParams(new FormData(form))}`).catch(() => ({}));
    if (mine === latest && html !== undefined) shown.replaceChildren(elements(html));
  };
  form.addEventListener("input", ({ target }) => {
    if (target.name === "use" || target.name.startsWith("weight.") || target.name === "seed" || target.name === "num_images") return;
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
  setInterval(async () => {
    if (document.hidden) return;
    const { ok, html } = await part(live.dataset.part).catch(() => ({ ok: false }));
    if (ok) live.replaceChildren(elements(html));
  }, Number(live.dataset.every));
}
