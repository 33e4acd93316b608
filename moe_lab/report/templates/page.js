(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const themes = read("themes");

  // Figures ---------------------------------------------------------------------------------------------------------------------
  const config = { responsive: true, displayModeBar: false, displaylogo: false, showTips: false, doubleClick: "reset" };
  const choices = all("select[data-figure]");
  const chosen = (name) => choices.find((select) => select.dataset.figure === name)?.value ?? "0";

  async function draw(plot) {
    const { figure, plot: index } = plot.dataset;
    const id = `spec-${figure}-${index}-${chosen(figure)}`, spec = read(id);
    plot.style.minWidth = `${document.getElementById(id).dataset.minWidth}px`;
    plot.style.height = `${spec.layout.height}px`;
    await Plotly.react(plot, spec.data, { ...spec.layout, template: themes[theme.now()] }, config);
    plot.dataset.drawn = chosen(figure);
  }
  const plots = all(".plot");
  const drawAll = async () => { for (const plot of plots) await draw(plot); document.documentElement.dataset.ready = theme.now(); };
  const retheme = (name) => Promise.all(plots.map((plot) => Plotly.relayout(plot, { template: themes[name] })))
    .then(() => { document.documentElement.dataset.ready = name; });

  for (const select of choices) {
    select.addEventListener("change", () => plots.filter((plot) => plot.dataset.figure === select.dataset.figure).forEach(draw));
  }
  for (const button of all("button.series")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", shown);
      for (const plot of plots.filter((candidate) => candidate.dataset.figure === button.dataset.figure)) {
        const lines = plot.data.flatMap((line, place) => line.legendgroup === button.dataset.series ? [place] : []);
        if (lines.length) Plotly.restyle(plot, { visible: shown }, lines);
      }
    });
  }
  for (const button of all("button.save")) {
    const plot = plots.find((candidate) => candidate.dataset.figure === button.dataset.figure);
    button.hidden = false;
    button.addEventListener("click", () => Plotly.downloadImage(plot, { format: "svg", filename: button.dataset.figure }));
  }

  // Tables: sorted by a column, filtered by a text; links into what is folded; data inside the page --------------------------------
  const SIZES = { k: 1e3, M: 1e6, B: 1e9, T: 1e12, P: 1e15 };
  function valueOf(text) {
    const match = /^([\u2212-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)([kMBTP]?)$/.exec(text.trim());
    return match ? Number(match[1].replace("\u2212", "-").replaceAll(",", "")) * (SIZES[match[2]] ?? 1) : null;
  }
  const before = (a, b) => {
    const [first, second] = [valueOf(a), valueOf(b)];
    if (first === null && second === null) return a.localeCompare(b, undefined, { numeric: true });
    return first === null ? 1 : second === null ? -1 : first - second;  // what has no number stands last
  };
  for (const table of all("main table")) {
    const body = table.tBodies[0], rows = [...body.rows];
    if (rows.length < 2) continue;
    for (const [column, cell] of [...table.tHead.rows[0].cells].entries()) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...cell.childNodes);
      cell.append(button);
      button.addEventListener("click", () => {
        const up = cell.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", up ? "ascending" : "descending");
        const text = (row) => row.cells[column].textContent;
        body.append(...rows.toSorted((a, b) => up ? before(text(a), text(b)) : before(text(b), text(a))));
      });
    }
    if (rows.length < 8) continue;
    const label = document.createElement("label"), field = document.createElement("input");
    field.type = "search";
    label.className = "filter";
    label.append("Rows with ", field);
    table.parentElement.before(label);
    field.addEventListener("input", () => {
      const wanted = field.value.toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
  }
  function reveal() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    if (target.tagName === "DETAILS") target.open = true;
    for (let part = target; (part = part.parentElement?.closest("details"));) part.open = true;
    target.hidden = false;
    target.scrollIntoView();
  }
  addEventListener("hashchange", reveal);
  for (const link of all("a.data")) {
    const held = document.getElementById(`data-${link.dataset.name}`);
    if (!held) continue;
    link.download = `${link.dataset.name}.parquet`;
    link.addEventListener("click", () => { link.href = `data:application/vnd.apache.parquet;base64,${held.textContent}`; });
  }

  // Theme and print ---------------------------------------------------------------------------------------------------------------
  theme.follow(retheme);
  const PAPER = 680;  // CSS pixels between the margins of A4 and Letter: printing sends no resize event, and would cut wider figures
  const unfolded = () => plots.filter((plot) => plot.clientWidth);
  addEventListener("beforeprint", () => {
    for (const plot of unfolded()) Plotly.relayout(plot, { template: themes.light, width: Math.min(plot.clientWidth, PAPER) });
  });
  addEventListener("afterprint", () => retheme(theme.now()).then(() => unfolded().forEach((plot) => Plotly.Plots.resize(plot))));

  // Coloured text ---------------------------------------------------------------------------------------------------------------
  function colouredText(root) {
    const part = (name) => document.getElementById(name + root.dataset.end);
    const { lookup, modes } = JSON.parse(part("coloured-data").textContent);
    const bytes = (text) => new DataView(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
    const experts = bytes(lookup.experts), weights = bytes(lookup.weights);
    const tokens = all("[role=option]", root), boxes = all("[role=listbox]", root);
    const index = new Map(tokens.map((token, place) => [token, place]));
    const spoken = part("spoken"), panel = part("layers");
    const element = (name, text) => { const made = document.createElement(name); made.textContent = text; return made; };
    let current = null;

    function slots(place, layer) {
      const found = [];
      for (let slot = 0; slot < lookup.slots; slot++) {
        const at = (place * lookup.layers.length + layer) * lookup.slots + slot;
        const expert = experts.getUint16(2 * at, true);
        if (expert !== 65535) found.push([expert, weights.getUint8(at) / 255 * lookup.largestWeight]);
      }
      return found.sort((a, b) => b[1] - a[1]);
    }
    const isZero = (expert, layer) => expert >= lookup.firstZero[layer];
    const ffnCount = (found, layer) => found.filter(([expert]) => !isZero(expert, layer)).length;
    const name = (expert, layer) => isZero(expert, layer) ? `zero\u00a0${expert - lookup.firstZero[layer]}` : String(expert);

    function show(token) {
      if (token === current) return;
      current?.removeAttribute("aria-selected");
      current = token;
      token.setAttribute("aria-selected", "true");
      const place = index.get(token), layers = lookup.layers.map((_, layer) => slots(place, layer));
      const counts = layers.map(ffnCount), mean = counts.reduce((a, b) => a + b, 0) / counts.length;
      const loss = lookup.loss[place];
      const text = token.getAttribute("aria-label") || token.textContent.trim();
      spoken.replaceChildren(element("strong", text));
      spoken.append(` ${lookup.kind[place]} · token ${lookup.token[place]}, document ${lookup.doc[place]}, position ${lookup.pos[place]} · `,
        loss === null ? "no loss" : `loss ${loss.toFixed(3)} nats`, ` · mean ffn_count ${mean.toFixed(2)}`);
      if (layers.length <= 6) {  // deeper models would be read out for minutes; their table has its own tab stop
        const heard = element("span", layers.map((found, layer) =>
          `; layer ${lookup.layers[layer]}: ${found.map(([expert]) => name(expert, layer)).join(", ") || "none"}`).join(""));
        heard.className = "hidden";
        spoken.append(heard);
      }
      const table = document.createElement("table"), body = document.createElement("tbody"), head = document.createElement("thead");
      const row = document.createElement("tr");
      for (const heading of ["layer", "ffn_count", "expert (weight)"]) { const cell = element("th", heading); cell.scope = "col"; row.append(cell); }
      head.append(row);
      layers.forEach((found, layer) => {
        const line = document.createElement("tr"), first = element("th", lookup.layers[layer]);
        first.scope = "row";
        line.append(first, element("td", counts[layer]),
          element("td", found.map(([expert, weight]) => `${name(expert, layer)}\u00a0(${weight.toFixed(2)})`).join(", ") || "none"));
        body.append(line);
      });
      table.append(head, body);
      panel.hidden = false;
      panel.replaceChildren(table);
    }

    function line(token, down) {
      const from = token.getBoundingClientRect(), list = [...token.parentElement.children];
      const middle = (box) => (box.left + box.right) / 2;
      const rows = list.map((other) => [other, other.getClientRects()[0]]).filter(([, box]) => box && (down ? box.top > from.top + 4 : box.top < from.top - 4));
      if (!rows.length) return null;
      const tops = rows.map(([, box]) => box.top), next = down ? Math.min(...tops) : Math.max(...tops);
      return rows.filter(([, box]) => Math.abs(box.top - next) < 4)
        .reduce((best, row) => Math.abs(middle(row[1]) - middle(from)) < Math.abs(middle(best[1]) - middle(from)) ? row : best)[0];
    }
    const moves = {
      ArrowRight: (token) => token.nextElementSibling,
      ArrowLeft: (token) => token.previousElementSibling,
      ArrowDown: (token) => line(token, true),
      ArrowUp: (token) => line(token, false),
      Home: (token) => token.parentElement.firstElementChild,
      End: (token) => token.parentElement.lastElementChild,
    };
    for (const box of boxes) {
      box.addEventListener("keydown", (event) => {
        const move = moves[event.key];
        if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
        event.preventDefault();
        move(event.target)?.focus();
      });
      box.addEventListener("focusin", (event) => {
        const token = event.target.closest("[role=option]");
        if (!token) return;
        box.querySelector("[tabindex='0']").tabIndex = -1;
        token.tabIndex = 0;
        show(token);
      });
      box.addEventListener("pointerover", (event) => { const token = event.target.closest("[role=option]"); if (token) show(token); });
    }

    const mode = part("mode"), legend = part("legend"), heading = part("legend-h");
    const recolour = () => {
      const [title, codes, entries] = [modes[mode.value].name, modes[mode.value].codes, modes[mode.value].legend];
      tokens.forEach((token, place) => { token.dataset.tint = codes[place]; });
      heading.textContent = `${title} (number of tokens)`;
      legend.replaceChildren(...entries.map(([code, text]) => {
        const item = document.createElement("li"), swatch = document.createElement("span");
        swatch.className = "swatch";
        swatch.dataset.tint = code;
        item.append(swatch, text);
        return item;
      }));
    };
    mode.addEventListener("change", recolour);
    if (mode.value !== "0") recolour();
  }

  const texts = all(".coloured"), textOf = document.getElementById("text-of");
  texts.forEach(colouredText);
  textOf?.addEventListener("change", () => texts.forEach((text, place) => { text.hidden = place !== Number(textOf.value); }));
  drawAll().then(reveal);
})();
