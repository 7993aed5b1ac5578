(() => {
  const faults = [];
  const rgba = (c) => { const m = c.match(/[\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
  const luminance = ([r, g, b]) => { const f = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }; return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b); };
  const ground = (e) => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; if (c[3] > 0) return [0, 0, 0, 1]; } return [255, 255, 255, 1]; };
  const name = (e) => e.tagName.toLowerCase() + (e.id ? '#' + e.id : '') + '.' + [...e.classList].join('.') + ' “' + (e.textContent || '').trim().slice(0, 30) + '”';
  const seen = (e) => { const r = e.getBoundingClientRect(); return r.width > 0 && r.height > 0 && getComputedStyle(e).visibility !== 'hidden'; };
  let measured = 0;
  for (const e of document.querySelectorAll('body *')) {
    if (!seen(e) || ![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const s = getComputedStyle(e), a = luminance(rgba(s.color)), b = luminance(ground(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const large = parseFloat(s.fontSize) >= 24 || (parseFloat(s.fontSize) >= 18.66 && Number(s.fontWeight) >= 700);
    measured++;
    if (ratio < (large ? 3 : 4.5)) faults.push('contrast ' + ratio.toFixed(2) + ': ' + name(e));
    if (parseFloat(s.fontSize) < 11) faults.push('text of ' + s.fontSize + ': ' + name(e));
  }
  if (measured < 5) faults.push('only ' + measured + ' texts were measured');
  if (document.documentElement.scrollWidth > window.innerWidth) faults.push('wider than the window: ' + document.documentElement.scrollWidth + ' of ' + window.innerWidth);
  for (const e of document.querySelectorAll('input:not([type=hidden]), select, textarea'))
    if (!(e.labels && e.labels.length && e.labels[0].textContent.trim()) && !e.getAttribute('aria-label')) faults.push('no label: ' + e.outerHTML.slice(0, 80));
  for (const e of document.querySelectorAll('a[href], button'))
    if (!e.textContent.trim() && !e.getAttribute('aria-label')) faults.push('no name: ' + e.outerHTML.slice(0, 80));
  for (const e of document.querySelectorAll('img')) { if (!e.hasAttribute('alt')) faults.push('no alt: ' + e.src); if (e.complete && e.naturalWidth === 0) faults.push('no picture: ' + e.src); }
  for (const e of document.querySelectorAll('script, style, iframe, object, embed, [style]')) faults.push('not of ours: ' + e.outerHTML.slice(0, 80));
  const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) faults.push('twice: #' + id);
  if (!document.documentElement.lang || !document.title || document.querySelectorAll('h1').length !== 1) faults.push('language, title or heading: ' + document.querySelectorAll('h1').length);
  return faults;
})()
