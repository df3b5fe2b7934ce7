"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const one = (name) => document.getElementById(name);
const every = (selector) => [...document.querySelectorAll(selector)];
const limit = (value, low, high) => Math.min(Math.max(value, low), high);
const slider = one("slice"), handle = one("handle"), stage = one("stage"), swiped = one("compare");
const last = data.slices.length - 1;
const look = { zoom: 1, x: 0, y: 0 };  // x and y: where the left upper corner lies, in sides of a view
let shown = Number(slider.dataset.start), swipe = 50;

function show(number) {
  shown = limit(Math.round(number), 0, last);
  const slice = data.slices[shown];
  slider.value = shown;
  slider.setAttribute("aria-valuetext", slice.text);
  one("where").textContent = slice.text;
  for (const image of every("img[data-panel]")) {
    const name = image.dataset.panel;
    image.src = "data:image/png;base64," + data.panels[name][shown];
    image.alt = [data.titles[name], slice.text, data.orientation].join(", ");
  }
  for (const text of every("[data-figures]")) text.textContent = slice.figures[text.dataset.figures] || "";
}

function place(zoom, x, y) {
  look.zoom = limit(zoom, 1, 12);
  look.x = limit(x, 1 - look.zoom, 0);
  look.y = limit(y, 1 - look.zoom, 0);
  stage.style.setProperty("--zoom", look.zoom);
  stage.style.setProperty("--x", 100 * look.x + "%");
  stage.style.setProperty("--y", 100 * look.y + "%");
  stage.classList.toggle("zoomed", look.zoom > 1);
  one("magnification").textContent = look.zoom.toFixed(1) + "×";
}

function zoomBy(factor, x = 0.5, y = 0.5) {  // what lies at x, y of a view stays there
  const zoom = limit(look.zoom * factor, 1, 12), change = zoom / look.zoom;
  place(zoom, x - (x - look.x) * change, y - (y - look.y) * change);
}

function swipeTo(percent) {
  swipe = limit(percent, 0, 100);
  swiped.style.setProperty("--swipe", swipe + "%");
  handle.setAttribute("aria-valuenow", Math.round(swipe));
  handle.setAttribute("aria-valuetext", Math.round(swipe) + " % input, the rest output");
}

slider.addEventListener("input", () => show(Number(slider.value)));
one("previous").addEventListener("click", () => show(shown - 1));
one("next").addEventListener("click", () => show(shown + 1));
one("closer").addEventListener("click", () => zoomBy(1.5));
one("farther").addEventListener("click", () => zoomBy(1 / 1.5));
one("whole").addEventListener("click", () => place(1, 0, 0));

let dragged = false;
function drag(event) {
  const box = swiped.getBoundingClientRect();
  swipeTo(100 * (event.clientX - box.left) / box.width);
}
handle.addEventListener("pointerdown", (event) => {
  dragged = true;
  handle.setPointerCapture(event.pointerId);
  event.stopPropagation();
});
handle.addEventListener("pointermove", (event) => { if (dragged) drag(event); });
for (const end of ["pointerup", "pointercancel"]) handle.addEventListener(end, () => { dragged = false; });
handle.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, Home: -100, End: 100 }[event.key];
  if (step === undefined) return;
  swipeTo(swipe + step * (event.shiftKey ? 5 : 1));
  event.preventDefault();
  event.stopPropagation();
});

for (const view of every(".view")) {
  const fingers = new Map();
  let turned = 0;
  view.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, event);
    view.setPointerCapture(event.pointerId);
  });
  view.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const box = view.getBoundingClientRect();
    const other = [...fingers.values()].find((finger) => finger.pointerId !== event.pointerId);
    if (other) {
      const gap = (finger) => Math.hypot(finger.clientX - other.clientX, finger.clientY - other.clientY) || 1;
      const middle = [(event.clientX + other.clientX) / 2 - box.left, (event.clientY + other.clientY) / 2 - box.top];
      zoomBy(gap(event) / gap(before), middle[0] / box.width, middle[1] / box.height);
    } else {
      const moved = [(event.clientX - before.clientX) / box.width, (event.clientY - before.clientY) / box.height];
      place(look.zoom, look.x + moved[0], look.y + moved[1]);
    }
    fingers.set(event.pointerId, event);
  });
  for (const end of ["pointerup", "pointercancel"]) view.addEventListener(end, (e) => fingers.delete(e.pointerId));
  view.addEventListener("wheel", (event) => {
    if (event.ctrlKey) {  // also how a touchpad reports a pinch
      const box = view.getBoundingClientRect();
      zoomBy(Math.exp(-event.deltaY / 200), (event.clientX - box.left) / box.width,
        (event.clientY - box.top) / box.height);
      event.preventDefault();
      return;
    }
    turned += event.deltaY * (event.deltaMode === 0 ? 1 : 40);
    const steps = Math.trunc(turned / 40);  // a touchpad sends many small turns
    if (shown + Math.sign(turned) >= 0 && shown + Math.sign(turned) <= last) event.preventDefault();
    if (steps === 0) return;
    turned = 0;
    show(shown + Math.sign(steps));
  }, { passive: false });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inView = event.target.closest(".view") !== null, scrolls = event.target.closest(".wide") !== null;
  const { key, shiftKey } = event;
  const moves = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[key];
  if (shiftKey && moves && look.zoom > 1) place(look.zoom, look.x + moves[0], look.y + moves[1]);
  else if ((key === "ArrowRight" && !scrolls) || (key === "ArrowUp" && inView)) show(shown + 1);
  else if ((key === "ArrowLeft" && !scrolls) || (key === "ArrowDown" && inView)) show(shown - 1);
  else if (key === "Home" && inView) show(0);
  else if (key === "End" && inView) show(last);
  else if (key === "+" || key === "=") zoomBy(1.5);
  else if (key === "-") zoomBy(1 / 1.5);
  else if (key === "0") place(1, 0, 0);
  else return;
  event.preventDefault();
});

show(shown);
place(1, 0, 0);
swipeTo(50);
