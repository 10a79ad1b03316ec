// Zoom, search, tooltips and keyboard for one flame graph. Everything it knows it reads from the
// drawn frames; names go back into the page as text nodes and attributes, never as markup.
(function () {
  "use strict";
  const root = document.currentScript.closest("svg");
  const area = root.querySelector(".frames");
  const alone = root === document.documentElement;
  const SVG = "http://www.w3.org/2000/svg", HTML = "http://www.w3.org/1999/xhtml";
  const height = root.viewBox.baseVal.height, designed = root.viewBox.baseVal.width;
  const { rows, row, pad, hidden, inverted: drawnInverted } = Object.fromEntries(
    Object.entries(area.dataset).map(([key, value]) => [key, Number(value)]));
  const inset = 3;

  function make(parent, namespace, tag, attributes) {
    const node = document.createElementNS(namespace, tag);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    return parent.appendChild(node);
  }

  // --- the frames, parents before children, left to right ---------------------------------------
  const path = [], levels = Array.from({ length: rows }, () => []);
  const frames = Array.from(area.children, (node) => {
    const [start, value, depth] = node.dataset.t.split(" ").map(Number);
    const title = node.querySelector("title");
    const told = title.textContent, end = told.indexOf("\n");
    const frame = {
      node, start, value, depth, end: start + value, name: told.slice(0, end), about: told.slice(end + 1),
      rect: node.querySelector("rect"), text: node.querySelector("text"),
      own: (node.dataset.own || "0 0").split(" ").map(Number),
      parent: depth ? path[depth - 1] : null, children: [], shown: true,
    };
    path[depth] = frame;
    if (frame.parent) frame.parent.children.push(frame);
    levels[depth].push(frame);
    title.remove();  // our own tooltip says it at once
    node.setAttribute("role", "treeitem");
    node.setAttribute("aria-level", depth + 1);
    node.setAttribute("aria-label", frame.name + ", " + frame.about);
    node.setAttribute("tabindex", -1);
    return frame;
  });
  const of = new Map(frames.map((frame) => [frame.node, frame]));
  const all = frames[0], total = all.value;
  area.setAttribute("role", "tree");
  area.setAttribute("aria-label", "Frames: arrow keys move, Enter zooms, Escape resets, / searches");
  root.classList.add("live");

  const probe = make(area, SVG, "text", {});
  probe.textContent = "m".repeat(100);
  const cell = probe.getComputedTextLength() / 100 || 7.23;
  probe.remove();

  // --- layout -----------------------------------------------------------------------------------
  const top = Number(all.rect.getAttribute("y")) - (drawnInverted ? 0 : (rows - 1) * row);
  let width = 0, zoomed = all, current = all, inverted = Boolean(drawnInverted);

  function label(frame, pixels) {
    const columns = Math.floor((pixels - 2 * inset) / cell);
    const whole = fit(frame.name, columns), [start, end] = frame.own;
    if (!start || whole === frame.name || end < columns) return whole;
    const own = fit(Array.from(frame.name).slice(start).join(""), columns - 1);
    if (!own) return "";  // rather the function's own name than its qualifiers
    const file = own[0] === "+" && /^[ -~]*$/.test(frame.name) ? columns - 1 - own.length : 0;
    return frame.name.slice(0, Math.max(0, file)) + "\u2026" + own;
  }

  function fit(text, columns) {
    if (columns < 2) return "";
    const chars = Array.from(text);
    let used = 0, kept = chars.length;
    for (let i = 0; i < chars.length; i++) {
      used += chars[i] >= "\u1100" ? 2 : 1;
      if (used > columns - (i < chars.length - 1 ? 1 : 0)) { kept = i; break; }
    }
    if (kept === chars.length) return text;
    return kept < 2 ? "" : chars.slice(0, kept).join("").trimEnd() + "\u2026";
  }

  function place(frame, x, pixels) {
    frame.x = x;
    frame.y = top + row * (inverted ? frame.depth : rows - 1 - frame.depth);
    frame.width = pixels;
    frame.rect.setAttribute("x", x.toFixed(2));
    frame.rect.setAttribute("y", frame.y);
    frame.rect.setAttribute("width", pixels.toFixed(2));
    frame.node.classList.toggle("thin", pixels < 2);
    const shown = label(frame, pixels);
    if (shown && !frame.text) frame.text = make(frame.node, SVG, "text", {});
    if (frame.text) {
      frame.text.setAttribute("y", frame.y + 12);
      frame.text.setAttribute("x", (x + inset).toFixed(2));
      frame.text.textContent = shown;
    }
  }

  function layOut() {
    const room = width - 2 * pad, scale = room / (zoomed.value || 1);
    for (const frame of frames) {
      const above = frame.depth <= zoomed.depth && frame.start <= zoomed.start && frame.end >= zoomed.end;
      const inside = frame.depth > zoomed.depth && frame.start >= zoomed.start && frame.end <= zoomed.end;
      frame.shown = above || inside;
      frame.node.style.display = frame.shown ? "" : "none";
      frame.node.classList.toggle("up", above && frame !== zoomed);
      if (above) place(frame, pad, room);
      else if (inside) place(frame, pad + (frame.start - zoomed.start) * scale, frame.value * scale);
    }
    ring();
  }

  function resize() {
    const now = Math.max(designed, Math.floor(root.getBoundingClientRect().width));
    if (now === width) return;
    width = now;
    root.setAttribute("width", width);  // with the height, the ratio that CSS scales by
    root.setAttribute("viewBox", `0 0 ${width} ${height}`);
    box.setAttribute("x", pad + titleWidth + 16);
    box.setAttribute("width", width - 2 * pad - titleWidth - 16);
    layOut();
  }

  function zoom(frame) {
    if (frame === zoomed) return;
    zoomed.node.removeAttribute("aria-current");
    zoomed = frame;
    if (frame !== all) frame.node.setAttribute("aria-current", "true");
    reset.disabled = frame === all;
    hideTip();
    layOut();
    if (!current.shown) select(frame, false);
  }

  // --- search -----------------------------------------------------------------------------------
  // Time under a matching frame counts once, however many frames of its path match. Frames too
  // narrow to be drawn can't be searched: with any of those the sum is a lower bound.
  function search(wanted) {
    let pattern = null, matched = 0, until = 0, hits = 0;
    input.removeAttribute("aria-invalid");
    if (wanted) {
      try {
        pattern = new RegExp(wanted, /[A-Z]/.test(wanted.replace(/\\./g, "")) ? "" : "i");
      } catch (error) {
        input.setAttribute("aria-invalid", "true");
      }
    }
    for (const frame of frames) {
      const hit = pattern !== null && frame !== all && pattern.test(frame.name);
      frame.node.classList.toggle("hit", hit);
      if (!hit) continue;
      hits++;
      if (frame.start >= until) {
        matched += frame.value;
        until = frame.end;
      }
    }
    root.classList.toggle("searched", pattern !== null);
    if (pattern === null) {
      output.textContent = wanted ? "not a regular expression" : "";
      return;
    }
    const bound = hidden > 0 && matched < total ? "\u2265 " : "";
    const share = total ? (100 * matched / total).toFixed(2) : "0.00";
    const counted = hits === 1 ? "1 frame" : hits + " frames";
    output.textContent = `matched ${bound}${share} % \u00b7 ${time(matched)} \u00b7 ${counted}`;
  }

  function time(us) {
    if (us < 1000) return us + " \u00b5s";
    const seconds = Math.floor(us / 1e6), two = (number) => String(number).padStart(2, "0");
    if (seconds >= 3600) return `${Math.floor(seconds / 3600)} h ${two(Math.floor(seconds / 60) % 60)} min`;
    if (seconds >= 60) return `${Math.floor(seconds / 60)} min ${two(seconds % 60)} s`;
    const [value, unit] = us < 1e6 ? [us / 1e3, " ms"] : [us / 1e6, " s"];
    return value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0) + unit;
  }

  function clear() {
    input.value = "";
    search("");
  }

  // --- tools ------------------------------------------------------------------------------------
  const titleWidth = root.querySelector(".h1").getComputedTextLength();
  const box = make(root, SVG, "foreignObject", { y: 4, height: 36 });
  root.insertBefore(box, area);  // Tab comes here before the frames
  const tools = make(box, HTML, "div", { class: "tools" });
  const output = make(tools, HTML, "output", { "aria-live": "polite" });
  const input = make(tools, HTML, "input", {
    type: "search", placeholder: "Search (regex)   /", spellcheck: "false",
    "aria-label": "Search frames by regular expression",
  });
  const flip = make(tools, HTML, "button", {
    type: "button", class: "flip", title: "Root at the top or at the bottom",
  });
  flip.textContent = "Flip";
  const reset = make(tools, HTML, "button", { type: "button", class: "reset" });
  reset.textContent = "Reset zoom";
  reset.disabled = true;
  input.addEventListener("input", () => search(input.value));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      clear();
      select(current, true);
    } else if (event.key === "Enter") {
      const hit = frames.find((frame) => frame.shown && frame.node.classList.contains("hit"));
      if (hit) select(hit, true);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  reset.addEventListener("click", () => zoom(all));
  flip.addEventListener("click", () => {
    inverted = !inverted;
    layOut();
  });

  // --- tooltip and focus ring -------------------------------------------------------------------
  const rings = [0, 1].map(() => make(root, SVG, "rect", { class: "ring", visibility: "hidden", rx: 2 }));
  const tip = make(root, SVG, "g", { class: "tip", visibility: "hidden", "aria-hidden": "true" });
  const plate = make(tip, SVG, "rect", { rx: 4 });
  const words = make(tip, SVG, "text", {});

  function showTip(frame, clientX, clientY) {
    const room = Math.floor((Math.min(width, 900) - 40) / cell);
    const lines = [], chars = Array.from(frame.name);
    for (let i = 0; i < chars.length; i += room) lines.push(chars.slice(i, i + room).join(""));
    words.replaceChildren();
    lines.concat(frame.about).forEach((line, i) => {
      const what = i < lines.length ? "name" : "what";
      const span = make(words, SVG, "tspan", { x: 9, y: 18 + 16 * i, class: what });
      span.textContent = line;
    });
    const lengths = Array.from(words.children, (span) => span.getComputedTextLength());
    const wide = Math.max(...lengths) + 18;
    const high = 16 * (lines.length + 1) + 11;
    plate.setAttribute("width", wide);
    plate.setAttribute("height", high);
    const seen = root.getBoundingClientRect(), unit = seen.width / width;
    let x = (clientX - seen.left) / unit + 12, y = (clientY - seen.top) / unit + 16;
    if (x + wide > width - 4) x = Math.max(4, width - 4 - wide);
    if (clientY + (high + 20) * unit > window.innerHeight) y -= high + 30;
    tip.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
    tip.setAttribute("visibility", "visible");
  }

  function hideTip() {
    tip.setAttribute("visibility", "hidden");
  }

  function ring() {
    const on = document.activeElement === current.node && current.shown && keys;
    for (const rect of rings) {
      rect.setAttribute("visibility", on ? "visible" : "hidden");
      if (!on) continue;
      rect.setAttribute("x", current.x - 1);
      rect.setAttribute("y", current.y - 1);
      rect.setAttribute("width", current.width + 2);
      rect.setAttribute("height", row + 1);
    }
  }

  // --- keyboard: one frame is in the tab order, the arrows move it ------------------------------
  let keys = false;

  function select(frame, focus) {
    current.node.setAttribute("tabindex", -1);
    current = frame;
    current.node.setAttribute("tabindex", 0);
    if (focus) current.node.focus();
    ring();
  }

  function beside(frame, step) {
    const level = levels[frame.depth];
    for (let i = level.indexOf(frame) + step; i >= 0 && i < level.length; i += step) {
      if (level[i].shown) return level[i];
    }
    return null;
  }

  function inward(frame) {
    return frame.children.filter((child) => child.shown)
      .reduce((best, child) => (best && best.value >= child.value ? best : child), null);
  }

  const moves = {
    ArrowLeft: (frame) => beside(frame, -1),
    ArrowRight: (frame) => beside(frame, 1),
    ArrowUp: (frame) => (inverted ? frame.parent : inward(frame)),
    ArrowDown: (frame) => (inverted ? inward(frame) : frame.parent),
    Home: () => all,
  };

  area.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves) {
      keys = true;
      const next = moves[event.key](current);
      if (next) select(next, true);
    } else if (event.key === "Enter" || event.key === " ") {
      keys = true;
      zoom(current);
      ring();
    } else return;
    event.preventDefault();
  });

  (alone ? window : root).addEventListener("keydown", (event) => {
    keys = true;
    const find = (event.ctrlKey || event.metaKey) && event.key === "f" && document.activeElement !== input;
    if (find || (event.key === "/" && document.activeElement !== input)) {
      input.focus();
      input.select();
    } else if (event.key === "Escape") {
      hideTip();
      if (zoomed !== all) zoom(all);
      else clear();
    } else return;
    event.preventDefault();
  });

  // --- pointer ----------------------------------------------------------------------------------
  const under = (event) => of.get(event.target.closest(".frames > g"));

  // On the document: Chromium makes an SVG element that listens for focus a stop for Tab.
  document.addEventListener("focusin", (event) => {
    const frame = of.get(event.target);
    if (!frame) return;
    if (frame !== current) select(frame, false);
    ring();
    if (keys) {
      const where = frame.rect.getBoundingClientRect();
      showTip(frame, where.left, where.bottom);
    }
  });
  document.addEventListener("focusout", (event) => {
    if (!of.has(event.target)) return;
    for (const rect of rings) rect.setAttribute("visibility", "hidden");
    hideTip();
  });
  area.addEventListener("mousedown", () => { keys = false; });
  area.addEventListener("mousemove", (event) => {
    const frame = under(event);
    if (frame) showTip(frame, event.clientX, event.clientY);
  });
  area.addEventListener("mouseleave", hideTip);
  area.addEventListener("click", (event) => {
    const frame = under(event);
    if (!frame) return;
    select(frame, false);
    zoom(frame);
  });

  select(all, false);
  resize();
  window.addEventListener("resize", resize);
})();
