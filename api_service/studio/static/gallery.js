// The gallery: older images come while one scrolls, and the place is kept. Selection, and a large view with keys.

import { fetchPart, parseHtml, text } from "./studio.js";

const pages = document.getElementById("pages");
const lightbox = document.getElementById("lightbox");
const selection = document.querySelector("[data-selection]");
const NEAR = "1500px";

// --- pages --------------------------------------------------------------------------------------------------------

async function appendNext(link) {
  const more = link.closest("[data-more]");
  if (more.dataset.loading) return false;
  more.dataset.loading = "1";
  const { ok, html } = await fetchPart(link.href);
  delete more.dataset.loading;
  if (!ok) return false;
  more.replaceWith(withPlainStars(parseHtml(html)));
  watchEnd();
  watchPages();
  return true;
}

const end = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) appendNext(target);
}, { rootMargin: NEAR });

function watchEnd() {
  end.disconnect();
  const link = pages.querySelector("[data-more] a");
  if (link) end.observe(link);
}

// Pages far from the window are empty boxes of the same height, so that thousands of images do not slow each frame. A
// page with a selected image stays, because the form sends it.
const FAR = "5000px";
const content = new WeakMap();

const nearby = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target, boundingClientRect } of entries) {
    if (isIntersecting) fill(target);
    else empty(target, boundingClientRect.height);
  }
}, { rootMargin: FAR });

// height: as the browser measured it for this frame; to measure it again between changes would lay out the page each time.
function empty(page, height) {
  if (content.has(page) || page.querySelector(":checked") || page.contains(document.activeElement)) return;
  page.style.height = `${height}px`;
  const kept = document.createDocumentFragment();
  kept.append(...page.childNodes);
  content.set(page, kept);
}

function fill(page) {
  if (!content.has(page)) return;
  page.append(content.get(page));
  content.delete(page);
  page.style.height = "";
}

function fillAll() {
  nearby.disconnect();
  for (const page of pages.querySelectorAll("[data-page]")) fill(page);
  watchPages(); // far pages are emptied again
}

function watchPages() {
  for (const page of pages.querySelectorAll("[data-page]")) nearby.observe(page);
}

addEventListener("resize", fillAll); // the heights are of the old width

// The history entry remembers how much was loaded and where the reader was.
async function returnToPlace() {
  const { loaded = 1, top = 0 } = history.state ?? {};
  while (pages.querySelectorAll("[data-page]").length < loaded) {
    const link = pages.querySelector("[data-more] a");
    if (!link || !(await appendNext(link))) break;
  }
  if (top) scrollTo({ top, behavior: "instant" });
  addEventListener("scroll", keepPlace, { passive: true });
  watchEnd();
  watchPages();
}

let waiting;
function keepPlace() {
  waiting ??= setTimeout(() => {
    waiting = undefined;
    history.replaceState({ loaded: pages.querySelectorAll("[data-page]").length, top: scrollY }, "");
  }, 150);
}

history.scrollRestoration = "manual";
returnToPlace();

// --- selection ----------------------------------------------------------------------------------------------------

const boxes = () => [...pages.querySelectorAll("[name=selected]")];
const unselect = selection.querySelector("[data-unselect]");
unselect.hidden = false;

function count() {
  const number = boxes().filter((box) => box.checked).length;
  selection.querySelector("[data-selected]").textContent = text("selected", { number });
  selection.querySelector("[data-needs-two]").disabled = number !== 2;
}

let last;
selection.addEventListener("click", (event) => {
  if (event.target.name !== "selected") return;
  if (event.shiftKey && last) {
    fillAll(); // the range may lie on several pages
    const all = boxes();
    const [from, to] = [all.indexOf(last), all.indexOf(event.target)].sort((a, b) => a - b);
    for (const box of all.slice(from, to + 1)) box.checked = event.target.checked;
  }
  last = event.target;
  count();
});
unselect.addEventListener("click", () => {
  for (const box of boxes()) box.checked = false;
  count();
});

// --- search by a picture ------------------------------------------------------------------------------------------

const like = document.querySelector("[data-like]");
for (const name of ["dragover", "drop"]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    if (name !== "drop") return;
    like.elements.image.files = event.dataTransfer.files;
    like.requestSubmit();
  });
}

// --- favourites ---------------------------------------------------------------------------------------------------

// The click on a star is handled here. As a button that submits, each new one would make the browser search the whole form
// for its default button: for 10,000 images this takes most of the time of scrolling.
function withPlainStars(part) {
  for (const star of part.querySelectorAll("[data-favourite]")) star.type = "button";
  return part;
}

async function toggleFavourite(star) {
  const body = new URLSearchParams([["favourite", star.value]]);
  const { ok, html } = await fetchPart(star.formAction, { method: "POST", body });
  if (!ok) return star;
  const fresh = withPlainStars(parseHtml(html)).firstElementChild;
  star.replaceWith(fresh);
  return fresh;
}

withPlainStars(pages);
pages.addEventListener("click", async ({ target }) => {
  const star = target.closest("[data-favourite]");
  if (star) (await toggleFavourite(star)).focus();
});

// --- large view ---------------------------------------------------------------------------------------------------

let shown;

function show(item) {
  shown = item;
  const box = item.querySelector("[name=selected]");
  const image = item.querySelector(".output > a > img");
  Object.assign(lightbox.querySelector("img"), { src: box.dataset.full, alt: image.alt });
  lightbox.querySelector("figcaption").textContent = item.querySelector(".prompt").textContent;
  lightbox.querySelector("[data-open]").href = item.querySelector(".output > a").href;
  lightbox.querySelector("[data-download]").href = box.dataset.full;
  showStar();
  if (!lightbox.open) lightbox.showModal();
  item.scrollIntoView({ block: "nearest" }); // the images around it are there for the next step
}

function showStar() {
  lightbox.querySelector("[data-star]").setAttribute("aria-pressed", shown.querySelector("[data-favourite]").ariaPressed);
}

async function star() {
  await toggleFavourite(shown.querySelector("[data-favourite]"));
  showStar();
}

function step(by) {
  const items = [...pages.querySelectorAll(".selectable:has([name=selected])")];
  const next = items[items.indexOf(shown) + by];
  if (next) show(next);
  if (by > 0 && items.indexOf(shown) > items.length - 4) {
    const link = pages.querySelector("[data-more] a");
    if (link) appendNext(link);
  }
}

pages.addEventListener("click", (event) => {
  const link = event.target.closest(".output > a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  show(link.closest(".selectable"));
});
lightbox.addEventListener("click", ({ target }) => {
  if (target === lightbox || "close" in target.dataset) lightbox.close();
  else if ("star" in target.dataset) star();
  else if (target.dataset.stepBy) step(Number(target.dataset.stepBy));
});
lightbox.addEventListener("keydown", ({ key, ctrlKey, metaKey }) => {
  if (ctrlKey || metaKey) return;
  if (key === "ArrowRight") step(1);
  if (key === "ArrowLeft") step(-1);
  if (key === "f") star();
  if (key === "s") shown.querySelector("[name=selected]").click();
});
lightbox.addEventListener("close", () => {
  shown?.scrollIntoView({ block: "nearest" });
  shown?.querySelector(".output > a").focus();
});
