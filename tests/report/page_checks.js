// What a reader would trip over on an open page: `return faults(contrast)` lists it, one text a fault.
// Loaded by test_pages_in_browser.py.
function faults() {
  const plots = [...document.querySelectorAll(".plot")];
  const found = [];
  const say = (text) => found.push(text.replace(/\s+/g, " ").slice(0, 160));
  const box = (element) => element.getBoundingClientRect();
  const shared = (a, b) => [Math.min(a.right, b.right) - Math.max(a.left, b.left),
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top)];
  const over = (a, b, x = 1, y = 3) => { const [w, h] = shared(a, b); return w > x && h > y; };
  const name = (element) => element.textContent.trim();

  // Figures: drawn, whole, nothing on another thing.
  for (const plot of plots) {
    const where = `${plot.dataset.figure}${plot.dataset.plot}`, frame = box(plot);
    if (!frame.width) continue;  // folded away
    const marks = [...plot.querySelectorAll(".scatterlayer .trace path, .heatmaplayer image")];
    if (!marks.some((mark) => box(mark).width > 2)) say(`${where}: empty`);
    const texts = [...plot.querySelectorAll("svg text")].filter((text) => name(text) && box(text).width);
    for (const text of texts) {
      const its = box(text);
      if (its.left < frame.left - 1 || its.right > frame.right + 1 || its.top < frame.top - 1 || its.bottom > frame.bottom + 1) {
        say(`${where}: clipped: ${name(text)}`);
      }
    }
    texts.forEach((text, place) => texts.slice(place + 1).filter((other) => over(box(text), box(other)))
      .forEach((other) => say(`${where}: ${name(text)} on ${name(other)}`)));
    for (const bar of plot.querySelectorAll(".cbfills")) if (box(bar).right > frame.right + 1) say(`${where}: clipped: colour bar`);
    const areas = [...plot.querySelectorAll(".nsewdrag")].map(box);
    const outside = plot.querySelectorAll(".xtitle, .ytitle, .xtick text, .ytick text, .legend text, .colorbar text");
    for (const text of outside) {
      if (name(text) && areas.some((area) => over(area, box(text), 2, 4))) say(`${where}: over the data: ${name(text)}`);
    }
  }

  // Text of the page: readable, and not on other text.
  const root = box(document.documentElement);
  const floats = (element) => { for (let at = element; at; at = at.parentElement) if (["sticky", "fixed"].includes(getComputedStyle(at).position)) return true; return false; };
  const pieces = [], colours = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.textContent.trim() || parent.closest("script, style, svg, .hidden, .skip, option, noscript")) continue;
    if (!parent.checkVisibility({ visibilityProperty: true })) continue;
    const style = getComputedStyle(parent), token = parent.closest("[role=option]");
    colours.set(`${style.color}|${backdrop(parent)}`, node.textContent.trim());
    if (token || floats(parent)) continue;
    const clip = parent.closest(".scroll"), limits = clip ? box(clip) : root;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) if (rect.width > 1 && over(rect, limits)) pieces.push([rect, node.textContent.trim()]);
  }
  pieces.sort((a, b) => a[0].top - b[0].top);
  pieces.forEach(([rect, text], place) => {
    for (let next = place + 1; next < pieces.length && pieces[next][0].top < rect.bottom - 3; next++) {
      if (over(rect, pieces[next][0], 2, 5)) say(`text: ${text} on ${pieces[next][1]}`);
    }
  });
  for (const plot of plots) for (const text of plot.querySelectorAll("svg text")) {
    if (name(text)) colours.set(`${getComputedStyle(text).fill}|${backdrop(plot)}`, `${plot.dataset.figure}: ${name(text)}`);
  }
  for (const [pair, text] of colours) {
    const [ink, paper] = pair.split("|").map(numbers), ratio = contrast(ink, paper);
    if (ratio < 4.5) say(`contrast ${ratio.toFixed(2)}: ${text} (${pair})`);
  }

  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  if (wide > 0) say(`the page scrolls sideways by ${wide}`);
  return found;
}

function numbers(colour) {
  const canvas = numbers.canvas ??= document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
}

function backdrop(element) {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (!/^(transparent|rgba\(0, 0, 0, 0\))$/.test(colour)) return colour;
  }
  return "white";
}

// WCAG 2.2, "contrast ratio" and "relative luminance".
function contrast(a, b) {
  const light = (colour) => colour.slice(0, 3).map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const [high, low] = [light(a), light(b)].sort((x, y) => y - x);
  return (high + 0.05) / (low + 0.05);
}
