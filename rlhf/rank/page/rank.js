// The page in which a person ranks answers. The server owns the queue; this file keeps the order of the cards, and drafts until they are saved.
"use strict";

const RETRY = 3000; // milliseconds between tries when the server does not answer

let annotator = ""; // name
let task = null; // what /api/next gave
let order = []; // [{card, tie}], best first; tie: equal to the one before
let demonstration = ""; // a better answer that the person wrote
let tieNext = false; // "=" was pressed
let busy = false; // a request that changes something is under way

// --- The server ---------------------------------------------------------------------------------

async function ask(name, body) {
  for (let tries = 1; ; tries++) {
    try {
      const answer = await fetch(`api/${name}`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ annotator, ...body }),
      });
      if (answer.status >= 500) throw new Error((await answer.json()).error);
      if (answer.status === 401 || answer.status === 403 || answer.status === 421)
        throw new Error(await answer.text());
      const found = await answer.json();
      if (tries > 1) banner("");
      if (!answer.ok) banner(found.error);
      return answer.ok ? found : null;
    } catch (error) {
      if (name === "report") return null; // it is asked again with the next prompt
      const why = error instanceof TypeError ? "The server does not answer." : error.message;
      banner(`${why} Your work is kept in this browser; trying again…`);
      await new Promise((go) => setTimeout(go, RETRY));
    }
  }
}

async function change(name, body) {
  if (busy) return;
  busy = true;
  banner("");
  drawTray();
  const token = task && task.token;
  const found = await ask(name, body);
  busy = false;
  if (found) {
    if (name === "submit") forget(token);
    show(found);
  } else if (name === "undo") {
    drawTray();
  } else {
    show(await ask("next", {})); // this tab was behind another one
  }
}

// --- Drafts, which survive a closed tab -----------------------------------------------------------

const key = (token) => `rlhf-rank ${token}`;

function remember() {
  store((kept) => kept.setItem(key(task.token), JSON.stringify({ order, demonstration })));
}

function forget(token) {
  store((kept) => kept.removeItem(key(token)));
}

function restore() {
  const draft = JSON.parse(store((kept) => kept.getItem(key(task.token))) || "null");
  order = [];
  demonstration = "";
  tieNext = false;
  if (draft) {
    ({ order, demonstration } = draft);
  } else if (task.before) {
    const { ranks } = task.before;
    demonstration = task.before.demonstration || "";
    const cards = ranks.map((_, card) => card).sort((a, b) => ranks[a] - ranks[b]);
    order = cards.map((card, i) => ({ card, tie: i > 0 && ranks[card] === ranks[cards[i - 1]] }));
  }
}

// --- The order ------------------------------------------------------------------------------------

const placeOf = (card) => order.findIndex((one) => one.card === card);
const unranked = () => task.cards.map((_, card) => card).filter((card) => placeOf(card) < 0);

function takeOut(card) {
  const at = placeOf(card);
  if (at < 0) return;
  const [gone] = order.splice(at, 1);
  if (!gone.tie && order[at]) order[at].tie = false; // the next one now leads its group
}

function put(card, at, tie) {
  order.splice(at, 0, { card, tie: tie && at > 0 });
}

function pick(card) {
  if (placeOf(card) >= 0) takeOut(card);
  else put(card, order.length, tieNext);
  tieNext = false;
  changed();
}

function ranks() {
  const found = [];
  let rank = -1;
  for (const { card, tie } of order) found[card] = tie ? rank : ++rank;
  return found;
}

function tieRest() {
  unranked().forEach((card, i) => put(card, order.length, i > 0));
  changed();
}

function changed() {
  remember();
  drawPlaces();
  drawTray();
}

function describe(card) {
  const found = ranks();
  if (found[card] === undefined) return "not ranked";
  const rank = found[card];
  const equal = found.filter((other) => other === rank).length > 1;
  const name = ["best", "second", "third"][rank] || `place ${rank + 1}`;
  return equal ? `${name}, tied` : name;
}

// --- Drawing --------------------------------------------------------------------------------------

function show(found) {
  task = found.task;
  const { ranked, skipped, flagged, tasks, all_ranked, wanted } = found.progress;
  $("progress").max = wanted || 1;
  $("progress").value = all_ranked;
  const all = wanted > tasks || all_ranked > ranked ? ` (all: ${all_ranked} of ${wanted})` : ` of ${tasks}`;
  $("progress-text").textContent = `${ranked} ranked${all}`;
  $("undo").disabled = ranked + skipped + flagged === 0;
  $("work").hidden = $("tray").hidden = !task;
  $("done").hidden = Boolean(task);
  if (task) {
    restore();
    drawTask();
    window.scrollTo(0, 0);
    $("prompt-title").focus({ preventScroll: true });
  } else {
    $("done-text").textContent = `You ranked ${ranked}, skipped ${skipped} and flagged ${flagged}. Thank you, ${annotator}.`;
    $("reopen").hidden = !skipped;
    $("reopen").textContent = `Show what I skipped (${skipped})`;
  }
  report();
}

function drawTask() {
  const { prompt, cards } = task;
  const roles = { user: "User", assistant: "Assistant", system: "System" };
  const named = prompt.length > 1;
  $("prompt").replaceChildren(
    ...prompt.map((turn) => {
      const element = make("div", { className: `turn ${turn.role}` });
      if (named) element.append(make("span", { className: "role", textContent: roles[turn.role] || turn.role }));
      element.append(textOf(turn));
      return element;
    }),
  );
  $("cards").replaceChildren(
    ...cards.map((one, card) => {
      const chip = make("button", { type: "button", className: "chip", textContent: card + 1 });
      chip.dataset.card = card;
      const head = make("div", { className: "card-head" }, chip, make("span", { className: "place" }));
      const element = make("li", { className: "card" }, head, textOf(one));
      element.addEventListener("click", (event) => {
        const selected = !getSelection().isCollapsed;
        if (!selected && !justDragged() && !event.target.closest("a, button")) pick(card);
      });
      return element;
    }),
  );
  drawPlaces();
  drawTray();
}

function drawPlaces() {
  [...$("cards").children].forEach((element, card) => {
    const ranked = placeOf(card) >= 0;
    element.classList.toggle("ranked", ranked);
    const chip = element.querySelector(".chip");
    chip.className = `chip ${ranked ? "in" : "out"}`;
    chip.setAttribute("aria-label", `Answer ${card + 1}, ${describe(card)}`);
    element.querySelector(".place").textContent = ranked ? describe(card) : "";
  });
}

function drawTray() {
  if (!task) return;
  const focused = document.activeElement.closest?.("#order .chip")?.dataset.card;
  const parts = [make("span", { className: "end", textContent: order.length ? "Best" : "Pick the best first" })];
  order.forEach(({ card, tie }, at) => {
    if (at > 0) {
      const label = tie ? `Answers ${order[at - 1].card + 1} and ${card + 1} are equal: separate them` : `Make answers ${order[at - 1].card + 1} and ${card + 1} equal`;
      const between = make("button", { type: "button", className: `between${tie ? " equal" : ""}`, textContent: tie ? "=" : ">", title: label });
      between.setAttribute("aria-label", label);
      between.addEventListener("click", () => {
        order[at].tie = !tie;
        changed();
      });
      parts.push(between);
    }
    parts.push(chipOf(card, "in"));
  });
  if (tieNext) parts.push(make("span", { className: "between equal", textContent: "=" }));
  const left = unranked();
  if (order.length && !left.length) parts.push(make("span", { className: "end", textContent: "Worst" }));
  if (left.length) parts.push(make("span", { className: "end", textContent: order.length ? "Not ranked" : "" }), ...left.map((card) => chipOf(card, "out")));
  $("order").replaceChildren(...parts);
  if (focused !== undefined) $("order").querySelector(`[data-card="${focused}"]`)?.focus();
  $("submit").disabled = busy || left.length > 0;
  $("rest").disabled = left.length < 2;
  $("edit").textContent = demonstration ? "Edited ✓" : "Edit best";
  $("edit").disabled = !order.length;
  $("said").textContent = task.cards.map((_, card) => `Answer ${card + 1} ${describe(card)}`).join("; ");
}

function chipOf(card, kind) {
  const chip = make("button", { type: "button", className: `chip ${kind}`, textContent: card + 1 });
  chip.dataset.card = card;
  chip.title = `Answer ${card + 1}: ${task.cards[card].plain.slice(0, 80)}`;
  chip.setAttribute("aria-label", `Answer ${card + 1}, ${describe(card)}`);
  return chip;
}

// --- What people press ----------------------------------------------------------------------------

document.addEventListener("click", (event) => {
  const chip = event.target.closest(".chip");
  if (chip && !justDragged()) pick(Number(chip.dataset.card));
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const pressed = event.key;
  const chip = event.target.closest?.("#order .chip.in");
  if (chip && (pressed === "ArrowLeft" || pressed === "ArrowRight")) {
    step(Number(chip.dataset.card), pressed === "ArrowLeft" ? -1 : 1);
  } else if (pressed === "Enter" && event.target.closest?.("button, a")) {
    return; // the button's own
  } else if (task && /^[1-9]$/.test(pressed) && pressed <= task.cards.length) {
    pick(Number(pressed) - 1);
  } else if (keys[pressed]) {
    const button = $(keys[pressed]);
    if (!button.disabled && !button.closest("[hidden]")) button.click();
  } else if (task && pressed === "=") {
    tieNext = order.length > 0 && !tieNext;
    drawTray();
  } else if (task && pressed === "Backspace" && order.length) {
    takeOut(order.at(-1).card);
    changed();
  } else return;
  event.preventDefault();
});

const keys = { Enter: "submit", 0: "rest", s: "skip", f: "flag", e: "edit", u: "undo", p: "plain", w: "write", "?": "help" };

function step(card, by) {
  const at = placeOf(card);
  const to = Math.min(Math.max(at + by, 0), order.length - 1);
  if (to === at) return;
  takeOut(card);
  put(card, to, false);
  changed();
}

$("submit").addEventListener("click", () => judge("ranking", { ranks: ranks() }));
$("skip").addEventListener("click", () => judge("skip", {}));
$("undo").addEventListener("click", () => change("undo", {}));
$("rest").addEventListener("click", tieRest);
$("again").addEventListener("click", () => change("next", {}));
$("reopen").addEventListener("click", () => change("next", { skipped: true }));
watchHeader(() => task && drawTask());

function judge(kind, more) {
  if (task) change("submit", { token: task.token, kind, demonstration, ...more });
}

$("flag").addEventListener("click", () => $("flag-dialog").showModal());
$("flag-dialog").addEventListener("close", () => {
  if ($("flag-dialog").returnValue !== "ok") return;
  const reason = document.querySelector("input[name=reason]:checked").value;
  const remark = $("remark").value.trim();
  $("remark").value = "";
  $("flag-dialog").returnValue = "";
  judge("flag", { reason: remark ? `${reason}: ${remark}` : reason });
});

$("edit").addEventListener("click", () => {
  const best = order[0] && task.cards[order[0].card].text;
  $("demonstration").value = demonstration || best || "";
  $("edit-dialog").showModal();
});
$("demonstration").addEventListener("input", () => {
  demonstration = $("demonstration").value;
  remember();
});
$("discard").addEventListener("click", () => {
  demonstration = "";
  $("edit-dialog").close("");
});
$("edit-dialog").addEventListener("close", () => {
  const unchanged = task.cards.some((one) => one.text.trim() === demonstration.trim());
  if (unchanged) demonstration = "";
  changed();
});
document.querySelectorAll("[data-close]").forEach((one) => one.addEventListener("click", () => one.closest("dialog").close("")));

// --- Agreement ------------------------------------------------------------------------------------

async function report() {
  const found = await ask("report", {});
  if (!found) return;
  const [value] = found.pairwise;
  $("agreement").hidden = value === null;
  if (value === null) return;
  $("agreement").textContent = `Agreement ${Math.round(100 * value)} %`;
  const range = ([middle, low, high], digits) =>
    middle === null ? "not known yet" : low === null ? middle.toFixed(digits) : `${middle.toFixed(digits)} (95 % interval ${low.toFixed(digits)} to ${high.toFixed(digits)})`;
  $("agreement-text").textContent =
    `On ${found.num_shared_prompts} prompts that several people ranked: share of pairs ordered alike ${range(found.pairwise, 2)}; Krippendorff's alpha ${range(found.alpha, 2)}.`;
  const cell = (tag, text) => make(tag, { textContent: text });
  const rows = found.annotators.map((one) =>
    make("tr", {}, cell("td", one.name), cell("td", one.num_ranking), cell("td", one.agrees === null ? "–" : one.agrees.toFixed(2))),
  );
  const head = make("tr", {}, ...["Annotator", "Ranked", "Agrees with others"].map((text) => cell("th", text)));
  $("people").replaceChildren(make("table", {}, head, ...rows));
}

$("agreement").addEventListener("click", () => $("agreement-dialog").showModal());

// --- Who ranks ------------------------------------------------------------------------------------

async function begin(name) {
  annotator = name;
  const found = await ask("next", {});
  if (!found) return askName();
  store((kept) => kept.setItem("rlhf-rank name", name));
  $("who").textContent = name;
  show(found);
}

function askName() {
  $("name").value = annotator || store((kept) => kept.getItem("rlhf-rank name")) || "";
  $("name-dialog").showModal();
}

$("who").addEventListener("click", askName);
$("name-dialog").addEventListener("close", () => {
  const name = $("name").value.trim();
  if (name) begin(name);
  else if (!annotator) askName();
});

const known = store((kept) => kept.getItem("rlhf-rank name"));
if (known) begin(known);
else askName();
