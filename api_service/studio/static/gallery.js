// The gallery: older images come while one scrolls, and the place is kept. Selection, and a large view with keys.

import { fetchPart, parseHtml } from "./studio.js";

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
  more.replaceWith(parseHtml(html));
  watchEnd();
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
  selection.querySelector("[data-selected]").textContent = `${number} selected`;
}

let last;
selection.addEventListener("click", (event) => {
  if (event.target.name !== "selected") return;
  if (event.shiftKey && last) {
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
  if (!lightbox.open) lightbox.showModal();
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
  else if (target.dataset.stepBy) step(Number(target.dataset.stepBy));
});
lightbox.addEventListener("keydown", ({ key }) => {
  if (key === "ArrowRight") step(1);
  if (key === "ArrowLeft") step(-1);
});
lightbox.addEventListener("close", () => {
  shown?.scrollIntoView({ block: "nearest" });
  shown?.querySelector(".output > a").focus();
});
