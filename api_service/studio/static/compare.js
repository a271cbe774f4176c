// Two images over each other with a slider between them, and the choice of two results to compare.

import { fetchPart, parseHtml, text } from "./studio.js";

// --- the slider ---------------------------------------------------------------------------------------------------

function startSliders(part) {
  for (const wipe of part.querySelectorAll("[data-wipe]")) {
    const slider = wipe.querySelector("input");
    const show = () => wipe.style.setProperty("--at", `${slider.value}%`);
    slider.hidden = false;
    wipe.classList.add("over");
    slider.addEventListener("input", show);
    // The pointer moves the line anywhere on the images, as the keys do on the slider.
    const follow = ({ clientX }) => {
      const { left, width } = wipe.firstElementChild.getBoundingClientRect();
      slider.value = 100 * (clientX - left) / width;
      show();
    };
    wipe.firstElementChild.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      event.currentTarget.setPointerCapture(event.pointerId);
      follow(event);
    });
    wipe.firstElementChild.addEventListener("pointermove", (event) => event.buttons && follow(event));
    show();
  }
}

startSliders(document);

// --- the choice of two --------------------------------------------------------------------------------------------

const form = document.querySelector("[data-compare]");
const dialog = document.getElementById("comparison");
let chosen = [];

function tell() {
  form.querySelector("[data-compared]").textContent = text(chosen.length === 2 ? "two_chosen" : "choose_another");
  form.querySelector("button").disabled = chosen.length !== 2;
  form.hidden = !chosen.length;
}

if (form) {
  tell();
  document.addEventListener("change", ({ target }) => {
    if (target.form !== form) return;
    chosen = [...chosen.filter((box) => box.checked && box.isConnected && box !== target), ...(target.checked ? [target] : [])];
    while (chosen.length > 2) chosen.shift().checked = false; // the latest two
    tell();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const { html } = await fetchPart(`${form.action}?${new URLSearchParams(chosen.map((box) => ["selected", box.value]))}`);
    dialog.lastElementChild.replaceChildren(parseHtml(html));
    startSliders(dialog);
    dialog.showModal();
    dialog.querySelector("[data-wipe] input")?.focus();
  });
}
