(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const byId = (id) => document.getElementById(id);
  const within = (id, selector) => document.querySelector(`#${id} ${selector}`);
  const themes = read("themes"), { seconds, parts, views } = read("initial");
  const config = { responsive: true, displayModeBar: false, displaylogo: false, showTips: false, doubleClick: "reset" };
  const view = { search: "", run: "", metric: "", step: "" };
  let mark = "", seen = "", newest = true;  // newest: the map of load follows the last step
  const element = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    Object.assign(made, attributes);
    return made;
  };

  // Figures: `draw` keeps the order of calls for one plot, and draws the last of those that wait ---------------------------------
  const drawing = {};
  async function draw(name, figure) {
    const box = byId(`figure-${name}`), plot = box.querySelector(".plot");
    box.hidden = !figure;
    if (!figure) return;
    box.querySelector("figcaption").textContent = figure.caption;
    plot.hidden = !figure.spec;
    if (!figure.spec) return;
    plot.setAttribute("aria-label", figure.summary);
    plot.style.height = `${figure.height}px`;
    const waits = drawing[name];
    drawing[name] = figure;
    if (waits) return;
    try {
      while (drawing[name]) {
        const { spec } = figure = drawing[name];
        await Plotly.react(plot, spec.data, { ...spec.layout, height: figure.height, uirevision: name, template: themes[theme.now()] }, config);
        if (drawing[name] === figure) delete drawing[name];
      }
    } finally { delete drawing[name]; }
  }
  const plots = () => [...document.querySelectorAll(".js-plotly-plot")];
  theme.follow((name) => plots().forEach((plot) => Plotly.relayout(plot, { template: themes[name] })));

  // As plotly shows it: it reads tags in names.
  const plain = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}\u2026` : text).replace(/[&<>]/g, (letter) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[letter]);
  const MARKED = 110;  // characters of 20 points: so few are marked, and one point is a mark alone
  function curves() {
    const list = parts.curves, metric = byId("metric").value;
    if (!list || !metric) return;
    const data = [], groups = new Set();
    for (const run of list.runs) {
      const curve = parts[`curve/${run}`], [x, y] = metric === "validation" ? curve?.validation ?? [] : [curve?.x, curve?.y[metric]];
      if (!y) continue;
      data.push({ type: "scatter", x, y, mode: x.bdata.length < MARKED ? "lines+markers" : "lines", line: curve.line, name: plain(curve.group, 40), legendgroup: curve.group,
        showlegend: !groups.has(curve.group), text: plain(curve.name, 120), hovertemplate: "%{text}<br>%{x:.4s}: %{y:.4g}<extra></extra>" });
      groups.add(curve.group);
    }
    const title = list.metrics.find(([name]) => name === metric)[1];
    const layout = { height: 420, hovermode: "closest", xaxis: { title: { text: list.unit }, rangemode: "tozero" }, yaxis: { title: { text: title } } };
    const caption = `n = ${data.length}; one line is one run, of at most 150 points. ${list.note}`;
    draw("curves", { spec: { data, layout }, height: 420, caption, summary: `${title} over ${list.unit} of ${data.length} runs.` });
  }

  // Texts and tables ------------------------------------------------------------------------------------------------------------

  function facts(list, pairs) {
    list.replaceChildren(...pairs.map(([name, text]) => {
      const pair = element("div");
      pair.append(element("dt", name), element("dd", text));
      return pair;
    }));
  }
  function table(box, content, name) {
    if (!content) { box.replaceChildren(); return; }
    const scroll = element("div", undefined, { className: "scroll", tabIndex: 0 }), made = element("table"), head = element("tr"), body = element("tbody");
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", name);
    head.append(...content.header.map((text) => element("th", text, { scope: "col" })));
    content.rows.forEach((row, place) => {
      const line = element("tr");
      row.forEach((text, column) => {
        const cell = element(column ? "td" : "th", column || !content.runs ? text : undefined);
        if (!column) cell.scope = "row";
        if (!column && content.runs) {
          const link = element("button", text, { type: "button", className: "link" });
          link.addEventListener("click", () => { look(content.runs[place]); byId("run").scrollIntoView(); });
          cell.append(link);
        }
        line.append(cell);
      });
      body.append(line);
    });
    made.append(element("thead"), body);
    made.tHead.append(head);
    scroll.append(made);
    box.replaceChildren(scroll, ...(content.left_out ? [element("p", `${content.left_out} more rows are not shown.`, { className: "note" })] : []));
  }
  function options(select, pairs, chosen) {
    select.replaceChildren(...pairs.map(([value, text]) => element("option", text, { value })));
    if (pairs.some(([value]) => value === chosen)) select.value = chosen;
  }

  const show = {
    answer(part) {
      within("answer", ".lead").textContent = part.sentence;
      facts(within("answer", ".facts"), part.facts);
      within("answer", ".notes").replaceChildren(...part.notes.map((text) => element("p", text, { className: "note" })));
    },
    curves(part) {
      byId("curves").hidden = !part.metrics.length;
      options(byId("metric"), part.metrics, byId("metric").value);
      runs();
    },
    alarms(part) { byId("alarms").hidden = !part; table(within("alarms", ".rows"), part, "Alarms"); },
    table(part) { byId("runs").hidden = !part.header; table(within("runs", ".rows"), part, "Runs"); },
    frontier(part) { draw("frontier", part); byId("frontier").hidden = !parts.frontier && !parts.missing; },
    missing(part) { table(within("frontier", ".rows"), part, "What the frontier lacks"); byId("frontier").hidden = !parts.frontier && !parts.missing; },
    failures(part) {
      byId("failures").hidden = !part.length;
      const open = new Set([...document.querySelectorAll("#failures details[open] summary")].map((summary) => summary.textContent));
      within("failures", ".lines").replaceChildren(...part.map(({ name, reason, lines }) => {
        const made = element("details"), title = `${name}: ${reason}`;
        made.append(element("summary", title), element("pre", lines || "It left no lines.", { tabIndex: 0 }));
        made.open = open.has(title);
        return made;
      }));
    },
    run(part) {
      byId("run").hidden = !part && !byId("run-of").options.length;
      facts(within("run", ".facts"), part?.facts ?? []);
      byId("run-note").textContent = part?.note ?? "";
      options(byId("layer-metric"), part?.metrics ?? [], view.metric);
      const steps = part?.steps ?? [], range = byId("step");
      range.max = Math.max(0, steps.length - 1);
      if (newest) range.value = range.max;
      range.disabled = steps.length < 2;
    },
    layers(part) { draw("layers", part); },
    load(part) { draw("load", part); byId("step-shown").textContent = part ? part.step.toLocaleString("en") : ""; },
  };

  // The run that is looked into: the first that has a curve, until a reader chooses one --------------------------------------------
  function runs() {
    const list = parts.curves?.runs ?? [], names = list.map((run) => [run, `${parts[`curve/${run}`]?.name ?? run}`]);
    if (view.run && !list.includes(view.run)) names.push([view.run, view.run]);
    options(byId("run-of"), names, view.run);
    if (!view.run && list.length) look(list[0]);
    byId("run").hidden = !names.length;
  }
  function look(run) {
    view.run = run;
    view.step = "";
    newest = true;
    byId("run-of").value = run;
    ask();
  }
  byId("run-of").addEventListener("change", (event) => look(event.target.value));
  byId("layer-metric").addEventListener("change", (event) => { view.metric = event.target.value; ask(); });
  byId("metric").addEventListener("change", curves);
  byId("step").addEventListener("input", (event) => {
    newest = event.target.value === event.target.max;
    view.step = newest ? "" : String(parts.run.steps[event.target.value]);
    ask();
  });
  byId("search").addEventListener("input", (event) => { view.search = event.target.value; ask(); });

  // Parts, from the page itself or from the server that it came from -----------------------------------------------------------------
  function place(changed) {
    Object.assign(parts, changed);
    const names = Object.keys(changed);
    for (const name of ["curves", "answer", "alarms", "table", "failures", "missing", "frontier", "run", "layers", "load"]) if (name in changed) show[name](changed[name]);
    if (names.some((name) => name.startsWith("curve"))) curves();
    for (const link of document.querySelectorAll("nav a")) link.parentElement.hidden = document.querySelector(link.hash).hidden;
    document.documentElement.dataset.ready = theme.now();
  }
  function ofThisFile() {
    const run = views[`run ${view.run}`] ?? null, metric = view.metric || run?.metrics[0]?.[0];
    const steps = Object.keys(views).filter((name) => name.startsWith(`load ${view.run} `)).map((name) => Number(name.split(" ")[2]));
    const step = view.step === "" ? Math.max(...steps) : Number(view.step);
    const wanted = view.search.toLowerCase(), all = parts.table;
    const kept = all.rows.map((row, place) => place).filter((place) => all.rows[place].join(" ").toLowerCase().includes(wanted));
    const table = { ...all, rows: kept.map((place) => all.rows[place]), runs: kept.map((place) => all.runs[place]) };
    show.table(table);
    const none = { facts: [], metrics: [], note: "This file holds no tables by layer of this run." };
    place({ run: run ? { ...run, steps } : none, layers: views[`layers ${view.run} ${metric}`] ?? null, load: views[`load ${view.run} ${step}`] ?? null });
  }

  let timer = 0, asking = false, again = false, lost = 0;
  async function ask() {
    if (!seconds) return ofThisFile();
    if (asking) { again = true; return; }
    asking = true;
    clearTimeout(timer);
    try {
      do {
        again = false;
        const query = new URLSearchParams({ mark, seen, ...view });
        const response = await fetch(`changes?${query}`, { signal: AbortSignal.timeout(20000), cache: "no-store", credentials: "omit", redirect: "error" });
        if (!response.ok) throw new Error(`the server answers ${response.status}`);
        const answer = await response.json();
        ({ mark, seen } = answer);
        lost = 0;
        byId("connection").hidden = true;
        place(answer.parts);
      } while (again);
    } catch (error) {
      lost ||= Date.now();
      byId("connection").textContent = `No answer from moe-lab watch since ${new Date(lost).toLocaleTimeString()}: what stands here may be old. Trying again.`;
      byId("connection").hidden = false;
    } finally {
      asking = false;
      timer = setTimeout(ask, 1000 * seconds);
    }
  }
  for (const event of ["online", "focus", "pageshow"]) addEventListener(event, () => { if (seconds) ask(); });
  document.addEventListener("visibilitychange", () => { if (seconds && !document.hidden) ask(); });
  if (seconds) ask(); else { place({ ...parts }); ofThisFile(); }
})();
