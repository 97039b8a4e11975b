// Dragging the number of an answer to its place in the order, with a mouse, a pen or a finger. The
// order itself is in rank.js.
"use strict";

let drag = null; // {card, x, y, ghost, chip}
let dragged = 0; // when the last drag ended: the click that follows it means nothing

document.addEventListener("pointerdown", (event) => {
  const chip = event.target.closest(".chip");
  if (!chip || event.button !== 0) return;
  drag = { card: Number(chip.dataset.card), x: event.clientX, y: event.clientY, chip, ghost: null };
});

// so that Enter submits after a click, and a drag selects no text; Tab still reaches every button
document.addEventListener("mousedown", (event) => {
  if (event.target.closest(".chip, #tray button")) event.preventDefault();
});

document.addEventListener("pointermove", (event) => {
  if (!drag) return;
  if (!drag.ghost) {
    if (Math.hypot(event.clientX - drag.x, event.clientY - drag.y) < 6) return;
    drag.ghost = make("div", { className: "ghost" }, drag.chip.cloneNode(true));
    drag.chip.classList.add("moving");
    document.body.append(drag.ghost);
  }
  drag.ghost.style.transform = `translate(${event.clientX - 20}px, ${event.clientY - 20}px)`;
  mark(target(event));
});

document.addEventListener("pointerup", (event) => {
  if (!drag) return;
  const { card, ghost } = drag;
  const where = ghost && target(event);
  endDrag();
  if (!ghost) return; // a click
  dragged = performance.now();
  if (where) drop(card, where);
});

document.addEventListener("pointercancel", endDrag);

const justDragged = () => performance.now() - dragged < 100;

function endDrag() {
  drag?.ghost?.remove();
  drag?.chip.classList.remove("moving");
  mark(null);
  drag = null;
}

function target(event) {
  const under = document.elementFromPoint(event.clientX, event.clientY);
  const chip = under?.closest("#order .chip.in");
  if (!chip) return under?.closest("#order") ? { side: "end" } : null;
  if (Number(chip.dataset.card) === drag.card) return null;
  const box = chip.getBoundingClientRect();
  const share = (event.clientX - box.left) / box.width;
  return { chip, side: share < 0.3 ? "before" : share > 0.7 ? "after" : "tie" };
}

function mark(where) {
  document.querySelectorAll(".before, .after, .tie").forEach((one) => one.classList.remove("before", "after", "tie"));
  where?.chip?.classList.add(where.side);
}

function drop(card, { chip, side }) {
  takeOut(card);
  if (!chip) put(card, order.length, false);
  else {
    const at = placeOf(Number(chip.dataset.card));
    if (side === "before") {
      const inside = order[at].tie; // between two that are equal: equal to both
      put(card, at, inside);
    } else put(card, at + 1, side === "tie" || Boolean(order[at + 1]?.tie));
  }
  changed();
}
