// The page Create: references as the prompt is typed, pictures by drop and paste, and submits in place.

import { fetchPart, followJob, parseHtml, text } from "./studio.js";

const TYPING_PAUSE_MS = 350;
const MAX_PICTURES = 16;
const PLAN_FIELDS = ["prompt", "concepts", "avoid", "avoid_ids", "model", "collection", "min_similarity", "similar_examples_count", "filter", "from_output"];
const CHOICE_FIELDS = /^(pin|use|planned|(weight|shown|concept)\..*)$/;

const form = document.getElementById("create");
const references = document.getElementById("references");
const results = document.getElementById(form.dataset.into);

// --- references ---------------------------------------------------------------------------------------------------

let timer, planning = Promise.resolve(), hasChanged = false, isPlanning = false;

// One request at a time: while a request waits for an embed worker, further letters do not send more requests.
async function plan() {
  clearTimeout(timer);
  timer = undefined;
  if (isPlanning) return void (hasChanged = true);
  isPlanning = true;
  do {
    hasChanged = false;
    const sent = [...new FormData(form)].filter(([name]) => CHOICE_FIELDS.test(name) || PLAN_FIELDS.includes(name));
    const { ok, html } = await fetchPart(`${form.dataset.asTyped}?${new URLSearchParams([...sent, ["pictures", pictures.files.length]])}`);
    if (hasChanged) continue;
    references.querySelector(":scope > .wrong")?.remove();
    if (ok) references.replaceChildren(parseHtml(html));
    else references.prepend(parseHtml(html)); // the choices stay
  } while (hasChanged);
  isPlanning = false;
}

function planSoon() {
  clearTimeout(timer);
  timer = setTimeout(() => (planning = plan()), TYPING_PAUSE_MS);
}

form.addEventListener("input", ({ target }) => {
  if (target.name?.startsWith("weight.")) target.parentElement.querySelector("output").textContent = Number(target.value).toFixed(2);
  if (PLAN_FIELDS.includes(target.name)) planSoon();
});

// --- pictures -----------------------------------------------------------------------------------------------------

const pictures = new DataTransfer();
const area = document.querySelector("[data-pictures]");
const input = area.querySelector("input[type=file]");
const chosen = area.querySelector("[data-chosen]");

function addPictures(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/") || pictures.files.length >= MAX_PICTURES) continue;
    pictures.items.add(file);
    const card = document.createElement("li");
    card.className = "card used";
    const address = URL.createObjectURL(file);
    const remove = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: text("remove") });
    remove.setAttribute("aria-label", text("remove_file", { name: file.name }));
    remove.addEventListener("click", () => {
      pictures.items.remove([...pictures.files].indexOf(file));
      URL.revokeObjectURL(address);
      card.remove();
      input.files = pictures.files;
      planSoon();
    });
    card.append(Object.assign(new Image(), { src: address, alt: file.name }), remove);
    chosen.append(card);
  }
  input.files = pictures.files;
  planSoon();
}

input.addEventListener("change", () => addPictures([...input.files].filter((file) => ![...pictures.files].includes(file))));
document.addEventListener("paste", ({ clipboardData }) => clipboardData.files.length && addPictures(clipboardData.files));
for (const name of ["dragover", "drop"]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    area.classList.toggle("dragging", name === "dragover");
    if (name === "drop") addPictures(event.dataTransfer.files);
  });
}
document.addEventListener("dragleave", ({ relatedTarget }) => relatedTarget || area.classList.remove("dragging"));

// --- more references ----------------------------------------------------------------------------------------------

const found = form.querySelector("[data-found]");
const find = form.querySelector("[data-find]");

async function searchMemory() {
  const sent = [...new FormData(form)].filter(([name]) => ["find", "collection", "filter", "pin"].includes(name));
  const { html } = await fetchPart(`${find.dataset.find}?${new URLSearchParams(sent)}`);
  found.replaceChildren(parseHtml(html));
}

form.elements.find.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
  event.preventDefault(); // the form's first button would draw
  searchMemory();
});
found.addEventListener("change", async ({ target }) => {
  if (!("pin" in target.dataset) || !target.checked) return;
  await (planning = plan());
  // It is among the references now, unless they could not be shown.
  const pinned = references.querySelector(`[name=pin][value="${target.value}"]`);
  if (!pinned) return;
  target.closest("li").remove();
  pinned.focus({ preventScroll: true });
});

// --- recent prompts -----------------------------------------------------------------------------------------------

const HISTORY = "afterimage.prompts", MAX_PROMPTS = 20;
const history = form.querySelector("[data-history]");

function recentPrompts() {
  try {
    return JSON.parse(localStorage.getItem(HISTORY)) ?? [];
  } catch {
    return []; // the browser keeps nothing, or something else wrote there
  }
}

function showHistory() {
  const prompts = recentPrompts();
  history.hidden = !prompts.length;
  history.querySelector("ul").replaceChildren(...prompts.map((prompt) => {
    const item = document.createElement("li");
    item.append(Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: prompt }));
    return item;
  }));
}

function keepPrompt(prompt) {
  const prompts = [prompt, ...recentPrompts().filter((each) => each !== prompt)].slice(0, MAX_PROMPTS);
  try {
    localStorage.setItem(HISTORY, JSON.stringify(prompts));
  } catch {
    return; // a full or forbidden storage
  }
  showHistory();
}

history.addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (!button) return;
  if ("forget" in button.dataset) {
    localStorage.removeItem(HISTORY);
    return showHistory();
  }
  form.elements.prompt.value = button.textContent;
  history.open = false;
  form.elements.prompt.focus();
  planSoon();
});
showHistory();

// --- shapes and models --------------------------------------------------------------------------------------------

const shapes = form.querySelector("[data-shapes]");
shapes.hidden = false;
shapes.addEventListener("click", ({ target }) => {
  if (!target.dataset.shape) return;
  const [wide, high] = target.dataset.shape.split(":").map(Number);
  const area = shapes.dataset.width * shapes.dataset.height;
  const even = (length) => Math.min(2048, Math.max(16, Math.round(length / 16) * 16));
  form.elements.width.value = even(Math.sqrt(area * wide / high));
  form.elements.height.value = even(Math.sqrt(area * high / wide));
  for (const each of shapes.children) each.setAttribute("aria-pressed", each === target);
});

// --- submit -------------------------------------------------------------------------------------------------------

form.querySelector("[data-without-script]").hidden = true;

function showErrors(fragment) {
  for (const message of fragment.querySelectorAll("[data-field]")) {
    const field = form.elements[message.dataset.field];
    const label = field?.closest?.("label");
    if (!label) continue;
    label.closest("details")?.setAttribute("open", "");
    const words = message.textContent.slice(message.textContent.indexOf(": ") + 2);
    label.append(Object.assign(document.createElement("span"), { className: "field-wrong", textContent: words }));
    message.remove();
  }
  form.querySelector(".actions").after(fragment);
  form.querySelector(".field-wrong")?.closest("label").querySelector("input, textarea, select").focus();
}

function clearErrors() {
  for (const old of form.querySelectorAll(".field-wrong, :scope > .wrong")) old.remove();
}

async function whenPlanned() {
  if (timer) planning = plan();
  await planning;
}

form.addEventListener("submit", async (event) => {
  if (event.submitter === find) {
    event.preventDefault();
    return searchMemory();
  }
  if (event.submitter?.formMethod === "get") return;
  event.preventDefault();
  const wantsRequest = event.submitter && "showRequest" in event.submitter.dataset;
  const button = event.submitter ?? form.querySelector(".go");
  button.disabled = true;
  await whenPlanned(); // the request has the references of this prompt
  const { ok, html } = await fetchPart(wantsRequest ? form.dataset.request : form.action, { method: "POST", body: new FormData(form) });
  button.disabled = false;
  clearErrors();
  const fragment = parseHtml(html);
  if (!ok) return showErrors(fragment); // `once` stays, so a retry makes no second job if the service accepted this one
  if (wantsRequest) {
    const dialog = document.getElementById("request");
    dialog.lastElementChild.replaceChildren(fragment);
    return dialog.showModal();
  }
  keepPrompt(form.elements.prompt.value.trim());
  form.elements.once.value = crypto.getRandomValues(new Uint32Array(4)).join("-");
  document.querySelector("[data-empty]")?.remove();
  const job = fragment.firstElementChild;
  results.prepend(fragment);
  followJob(job);
});

form.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  form.requestSubmit(form.querySelector(".go"));
});
