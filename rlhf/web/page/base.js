// What all pages of ours share. The server renders all texts: no HTML of a model gets here.
"use strict";

const $ = (id) => document.getElementById(id);

function banner(text) {
  $("banner").hidden = !text;
  $("banner").textContent = text;
}

function store(use) {
  try {
    return use(localStorage);
  } catch {
    return null; // the browser does not allow it: the page works without
  }
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

let plain = false; // texts as they were written

function watchHeader(draw) {
  $("help").addEventListener("click", () => $("help-dialog").showModal());
  $("plain").addEventListener("click", () => {
    plain = !plain;
    $("plain").setAttribute("aria-pressed", plain);
    draw();
  });
}

function textOf(one) {
  const element = make("div", { className: "text", dir: "auto" });
  if (!one.text.trim()) element.append(make("p", { className: "quiet", textContent: "(empty)" }));
  else if (plain) element.append(make("pre", { className: "plain", dir: "auto", textContent: one.plain }));
  else element.innerHTML = one.html; // rendered by the server, without any HTML of the text
  return element;
}
