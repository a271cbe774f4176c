// The page Corpus: files by drop, each with its own outcome; descriptions in place; selection.

import { fetchPart, parseHtml, text } from "./studio.js";

const AT_ONCE = 2;
const ATTEMPTS = 5;
const PENDING_MS = 3000;

const list = document.querySelector("[data-images]");

// --- upload -------------------------------------------------------------------------------------------------------

const form = document.querySelector("[data-uploads]");
if (form) prepareUploads();

function prepareUploads() {
  const panel = form.closest("details");
  const input = form.elements.file;
  const shown = panel.querySelector("[data-progress]");
  const [bar, status, rows] = ["progress", "[role=status]", "[data-added]"].map((part) => shown.querySelector(part));
  const waiting = [];
  let running = 0, total = 0, ended = 0, wrong = 0;

  for (const name of ["dragover", "drop"]) {
    document.addEventListener(name, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      panel.open = true;
      panel.classList.toggle("dragging", name === "dragover");
      if (name !== "drop") return;
      const files = new DataTransfer();
      for (const file of [...input.files, ...event.dataTransfer.files]) files.items.add(file);
      input.files = files.files;
      form.querySelector(".go").focus();
    });
  }
  document.addEventListener("dragleave", ({ relatedTarget }) => relatedTarget || panel.classList.remove("dragging"));

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    for (const old of form.querySelectorAll(".field-wrong, .wrong")) old.remove();
    const fields = [...new FormData(form)].filter(([name]) => name !== "file");
    if (!running) {
      rows.replaceChildren();
      total = ended = wrong = 0;
    }
    for (const file of input.files) {
      const row = showRow(file.name, text("waits"));
      rows.append(row);
      waiting.push({ file, fields, row });
      total += 1;
    }
    input.value = "";
    shown.hidden = false;
    report();
    while (running < AT_ONCE && waiting.length) work();
  });
  addEventListener("beforeunload", (event) => running && event.preventDefault());

  async function work() {
    running += 1;
    while (waiting.length) {
      const { file, fields, row } = waiting.shift();
      const ok = await send(file, fields, row);
      ended += 1;
      wrong += !ok;
      report();
    }
    running -= 1;
    if (!running) refreshList();
  }

  // Sends one file, again while the service is away or asks for a pause. The same file never becomes two images.
  async function send(file, fields, row) {
    for (let attempt = 1; ; attempt += 1) {
      const body = new FormData();
      for (const [name, value] of fields) body.append(name, value);
      body.append("file", file);
      row.querySelector(".facts").textContent = text(attempt > 1 ? "sending_again" : "sending");
      const { ok, status, html, retryMs } = await fetchPart(form.action, { method: "POST", body });
      const fresh = parseHtml(html);
      if (ok) {
        const outcome = fresh.firstElementChild;
        row.replaceWith(outcome);
        return outcome.dataset.outcome !== "skipped";
      }
      const mayPass = status === undefined || status === 429 || status >= 500;
      if (mayPass && attempt < ATTEMPTS) {
        row.querySelector(".facts").textContent = text("waits_to_send");
        await new Promise((resolve) => setTimeout(resolve, retryMs));
        continue;
      }
      const reasons = [...fresh.querySelectorAll("p b, [data-field]")].map((each) => each.textContent);
      row.replaceWith(showRow(file.name, reasons.join(" ") || fresh.textContent.trim(), text("not_added")));
      return false;
    }
  }

  function showRow(name, words, state = "") {
    const row = document.createElement("li");
    row.className = state ? "line failed" : "line";
    const what = Object.assign(document.createElement("span"), { className: "what", textContent: name });
    const facts = Object.assign(document.createElement("span"), { className: "facts", textContent: words });
    if (state) facts.prepend(Object.assign(document.createElement("b"), { className: "state", textContent: state }), " · ");
    what.append(" ", facts);
    row.append(what);
    return row;
  }

  function report() {
    Object.assign(bar, { max: total, value: ended });
    const refused = wrong ? ` ${text("refused", { number: wrong })}` : "";
    status.textContent = (ended < total ? text("sent_of", { sent: ended, total }) : text("added_of", { added: total - wrong, total })) + refused;
  }
}

// --- the list -----------------------------------------------------------------------------------------------------

const IN_USE = "details[open], [name=selected]:checked, :focus";

// Shows the images as they are now. A card that the reader edits, selects or has in focus stays.
async function refreshList() {
  const { ok, html } = await fetchPart(location.href);
  if (!ok) return;
  const fresh = parseHtml(html);
  if (!list.querySelector(IN_USE)) return list.replaceChildren(fresh);
  for (const card of fresh.querySelectorAll("[data-image]")) {
    const shown = list.querySelector(`[data-image="${card.dataset.image}"]`);
    if (shown && shown.dataset.state !== card.dataset.state && !shown.querySelector(IN_USE)) shown.replaceWith(card);
  }
}

setInterval(() => {
  if (!document.hidden && list.querySelector('[data-state="pending"]')) refreshList();
}, PENDING_MS);

list.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!("edit" in form.dataset)) return;
  event.preventDefault();
  const button = form.querySelector(".go");
  button.disabled = true;
  const { ok, html } = await fetchPart(form.action, { method: "POST", body: new FormData(form) });
  button.disabled = false;
  form.querySelector(":scope > .wrong")?.remove();
  if (!ok) return form.prepend(parseHtml(html));
  const card = form.closest("[data-image]");
  const fresh = parseHtml(html).firstElementChild;
  fresh.querySelector("[name=selected]").checked = card.querySelector("[name=selected]").checked;
  card.replaceWith(fresh);
  fresh.querySelector("summary").focus();
});

list.addEventListener("keydown", ({ key, target }) => {
  const edit = key === "Escape" && target.closest("details[open]");
  if (!edit) return;
  edit.open = false;
  edit.querySelector("summary").focus();
});

// --- selection ----------------------------------------------------------------------------------------------------

const selection = document.getElementById("selection");
if (selection) prepareSelection();

function prepareSelection() {
  const boxes = () => [...list.querySelectorAll("[name=selected]")];
  const count = () => {
    selection.querySelector("[data-selected]").textContent = text("selected", { number: boxes().filter((box) => box.checked).length });
  };
  let last;
  list.addEventListener("click", ({ target, shiftKey }) => {
    if (target.name !== "selected") return;
    const all = boxes();
    if (shiftKey && last?.isConnected) {
      const [from, to] = [all.indexOf(last), all.indexOf(target)].sort((a, b) => a - b);
      for (const box of all.slice(from, to + 1)) box.checked = target.checked;
    }
    last = target;
    count();
  });
  const unselect = selection.querySelector("[data-unselect]");
  unselect.hidden = false;
  unselect.addEventListener("click", () => {
    for (const box of boxes()) box.checked = false;
    count();
  });
  count();
}
