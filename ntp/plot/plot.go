// Package plot draws how own time and its sources did: offset of each source, the band in which the error of own time lies,
// the accuracy that is promised, and the clock's state beneath. SVG 1.1, for a browser or a printer, without script.
//
// Offsets run from microseconds to days, so the vertical axis is linear up to a millisecond and logarithmic beyond it.
package plot

import (
	"bytes"
	"cmp"
	"encoding/xml"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"yinjian/ntp"
	"yinjian/ntp/ledger"
)

// Data is what to draw.
type Data struct {
	Title    string // of the appliance, for people
	From, To time.Time
	Accuracy time.Duration
	Zone     *time.Location // of the time axis
	// Points are drawn one by one. Hours, where there are no points: a bar from the least to the largest offset, and the
	// largest bound.
	Points  []ledger.Point
	Hours   []ledger.Hour
	Changes []ledger.Change // of the state, ascending
}

// Sizes in the picture's own units.
const (
	width, height          = 1200.0, 620.0
	left, right            = 92.0, 24.0
	top, bottom            = 92.0, 452.0 // of the panel with the offsets
	stripTop, stripBottom  = 488.0, 516.0
	axisText               = 534.0
	legendTop, legendLines = 566.0, 24.0
)

// linear is the offset in µs up to which the axis is linear.
const linear = 1000.0

// states in the order of the legend, with what people call them and a colour that is told apart without red and green, by
// its lightness.
var states = []struct {
	state      ntp.State
	name, fill string
}{
	{ntp.Trusted, "可信 trusted", "#2b8a57"},
	{ntp.Holdover, "守时 holdover", "#f0b429"},
	{ntp.Acquiring, "获取中 acquiring", "#8db7e8"},
	{ntp.Cold, "冷 cold", "#c9ced6"},
	{ntp.Untrusted, "不可信 untrusted", "#a3341f"},
	{ntp.Suspect, "可疑 suspect", "#6d1f7a"},
}

// colours of sources (Okabe and Ito, told apart by the colour-blind).
var colours = []string{"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#000000", "#999933"}

// A span is a stretch of the time axis with what was seen in it: a point, or an hour.
type span struct {
	from, to time.Time
	state    ntp.State // "": more than one
	boundUS  int64     // 0: none
	sources  []mark
}

type mark struct {
	name              string
	last, least, most int64 // µs
	candidate         bool
}

// Draw answers the picture. Data without anything in its range is an error.
func Draw(d Data) ([]byte, error) {
	if !d.From.Before(d.To) {
		return nil, errors.New("plot: an empty range")
	}
	if d.Zone == nil {
		d.Zone = time.UTC
	}
	spans := d.spans()
	if len(spans) == 0 {
		return nil, errors.New("plot: nothing was recorded in this range")
	}
	c := &canvas{d: d, y: scale(d.Accuracy, spans)}
	c.open()
	c.grid()
	c.band(spans)
	c.threshold()
	c.offsets(spans)
	c.thresholdLabel()
	c.strip(spans)
	c.legend(spans)
	c.printf("</svg>\n")
	return c.b.Bytes(), nil
}

// spans are the points within the range, and the hours before them. Where the points begin within an hour, the hour is drawn
// and its points are not, unless it has little more than they show.
func (d *Data) spans() []span {
	var out []span
	var points []span
	for i, p := range d.Points {
		if p.At.Before(d.From) || p.At.After(d.To) {
			continue
		}
		s := span{from: p.At, to: p.At, state: p.State}
		if p.State == ntp.Trusted || p.State == ntp.Holdover {
			s.boundUS = p.BoundUS
		}
		next := d.To
		if i+1 < len(d.Points) {
			next = d.Points[i+1].At
		}
		if next.Sub(p.At) < 10*time.Minute { // a longer gap is one
			s.to = next
		}
		for _, o := range p.Sources {
			s.sources = append(s.sources, mark{o.Name, o.OffsetUS, o.OffsetUS, o.OffsetUS, o.Candidate && !o.Rejected})
		}
		points = append(points, s)
	}
	for _, h := range d.Hours {
		if h.From.IsZero() || !h.From.Before(d.To) || !h.To.After(d.From) {
			continue
		}
		if len(points) > 0 && h.To.After(points[0].from) {
			if points[0].from.Sub(later(h.From, d.From)) < 2*time.Minute {
				continue
			}
			points = slices.DeleteFunc(points, func(s span) bool { return s.from.Before(h.To) })
		}
		s := span{from: later(h.From, d.From), to: earlier(h.To, d.To), boundUS: h.BoundMaxUS}
		if len(h.StatesMS) == 1 {
			for s.state = range h.StatesMS {
			}
		}
		for _, o := range h.Sources {
			if o.Offsets > 0 {
				s.sources = append(s.sources, mark{o.Name, o.OffsetUS, o.MinUS, o.MaxUS, o.Candidates > o.Rejected})
			}
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b span) int { return a.from.Compare(b.from) })
	return append(out, points...)
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// An axis carries µs to the picture.
type axis struct {
	most  float64 // µs at the panel's edge
	ticks []int64 // µs, above zero
}

func scale(accuracy time.Duration, spans []span) axis {
	most := float64(accuracy.Microseconds()) * 1.5
	for _, s := range spans {
		most = max(most, float64(s.boundUS)*1.2)
		for _, m := range s.sources {
			most = max(most, math.Abs(float64(m.least))*1.2, math.Abs(float64(m.most))*1.2)
		}
	}
	a := axis{most: max(most, 2*linear)}
	for t := int64(linear); float64(t) <= a.most; t *= 10 {
		a.ticks = append(a.ticks, t)
	}
	return a
}

// shrink is linear up to linear and logarithmic beyond; it has no step there, nor a bend.
func shrink(us float64) float64 {
	if math.Abs(us) <= linear {
		return us / linear
	}
	return math.Copysign(1+math.Log(math.Abs(us)/linear), us)
}

func (a axis) at(us int64) float64 {
	mid := (top + bottom) / 2
	return mid - shrink(float64(us))/shrink(a.most)*(bottom-top)/2
}

type canvas struct {
	b bytes.Buffer
	d Data
	y axis
}

func (c *canvas) printf(format string, args ...any) { fmt.Fprintf(&c.b, format, args...) }

// text is escaped for XML: names come from configurations.
func text(s string) string {
	var b bytes.Buffer
	_ = xml.EscapeText(&b, []byte(s)) // a buffer takes it
	return b.String()
}

func (c *canvas) x(t time.Time) float64 {
	part := float64(t.Sub(c.d.From)) / float64(c.d.To.Sub(c.d.From))
	return left + min(max(part, 0), 1)*(width-left-right)
}

func (c *canvas) open() {
	c.printf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" width="%g" height="%g" font-family="'Noto Sans CJK SC','Source Han Sans SC','Microsoft YaHei','WenQuanYi Micro Hei',sans-serif" font-size="13" fill="#1f2933">`+"\n", width, height, width, height)
	c.printf(`<rect width="%g" height="%g" fill="#ffffff"/>`+"\n", width, height)
	c.printf(`<text x="%g" y="34" font-size="20" font-weight="bold">%s</text>`+"\n", left, text(c.d.Title))
	c.printf(`<text x="%g" y="58" fill="#52606d">各时间源与设备自身时间之差（点线），设备时间的误差上限（色带），承诺的准确度（虚线） offset of each source, bound, accuracy</text>`+"\n", left)
}

// grid has the lines of both axes, with what they stand for.
func (c *canvas) grid() {
	c.printf(`<g class="grid" stroke="#e4e7eb" stroke-width="1">` + "\n")
	for _, us := range c.y.all() {
		c.printf(`<line x1="%g" x2="%g" y1="%.1f" y2="%.1f"%s/>`+"\n", left, width-right, c.y.at(us), c.y.at(us), map[bool]string{true: ` stroke="#9aa5b1"`}[us == 0])
	}
	ticks, format := timeTicks(c.d.From, c.d.To, c.d.Zone)
	for _, t := range ticks {
		c.printf(`<line x1="%.1f" x2="%.1f" y1="%g" y2="%g"/>`+"\n", c.x(t), c.x(t), top, stripBottom)
	}
	c.printf("</g>\n" + `<g class="labels" fill="#52606d">` + "\n")
	for _, us := range c.y.all() {
		c.printf(`<text x="%g" y="%.1f" text-anchor="end">%s</text>`+"\n", left-8, c.y.at(us)+4.5, offsetLabel(us))
	}
	for _, t := range ticks {
		c.printf(`<text x="%.1f" y="%g" text-anchor="middle">%s</text>`+"\n", c.x(t), axisText, t.In(c.d.Zone).Format(format))
	}
	c.printf(`<text x="%g" y="%g" text-anchor="end">%s</text>`+"\n", width-right, axisText+18, text(fmt.Sprintf("%s 至 %s，%s", c.d.From.In(c.d.Zone).Format("2006-01-02 15:04"), c.d.To.In(c.d.Zone).Format("2006-01-02 15:04"), zoneName(c.d.From, c.d.Zone))))
	c.printf("</g>\n")
	c.printf(`<text x="%g" y="%g" text-anchor="end">状态</text>`+"\n", left-8, (stripTop+stripBottom)/2+4.5)
}

// all are the axis' ticks on both sides of zero, and zero.
func (a axis) all() []int64 {
	out := []int64{0}
	for _, t := range a.ticks {
		out = append(out, t, -t)
	}
	return out
}

func offsetLabel(us int64) string {
	sign := map[bool]string{true: "+", false: "−"}[us > 0]
	switch n := max(us, -us); {
	case us == 0:
		return "0"
	case n < 1_000_000:
		return fmt.Sprintf("%s%d ms", sign, n/1000)
	default:
		return fmt.Sprintf("%s%d s", sign, n/1_000_000)
	}
}

func zoneName(t time.Time, zone *time.Location) string {
	if _, offset := t.In(zone).Zone(); offset == 8*3600 {
		return "北京时间 UTC+8"
	}
	return t.In(zone).Format("UTC-07:00")
}

// timeTicks are six to twelve, at round times of the zone.
func timeTicks(from, to time.Time, zone *time.Location) (ticks []time.Time, format string) {
	format = "15:04"
	steps := []time.Duration{
		10 * time.Second, 30 * time.Second, time.Minute, 2 * time.Minute, 5 * time.Minute, 10 * time.Minute, 15 * time.Minute, 30 * time.Minute,
		time.Hour, 2 * time.Hour, 3 * time.Hour, 6 * time.Hour, 12 * time.Hour, 24 * time.Hour, 48 * time.Hour, 7 * 24 * time.Hour,
	}
	step := steps[len(steps)-1]
	for _, s := range steps {
		if to.Sub(from) <= 12*s {
			step = s
			break
		}
	}
	for ; to.Sub(from) > 12*step; step *= 2 {
	}
	switch {
	case step < time.Minute:
		format = "15:04:05"
	case step >= 24*time.Hour:
		format = "01-02"
	case to.Sub(from) > 24*time.Hour:
		format = "01-02 15:04"
	}
	_, offset := from.In(zone).Zone()
	shift := time.Duration(offset) * time.Second // so that midnight is the zone's
	for t := from.Add(shift).Truncate(step).Add(-shift); !t.After(to); t = t.Add(step) {
		if !t.Before(from) {
			ticks = append(ticks, t)
		}
	}
	return ticks, format
}

// band is the error of own time. Where it could not be signed there is none.
func (c *canvas) band(spans []span) {
	c.printf(`<g class="bound" fill="#9fb3c8" fill-opacity="0.45">` + "\n")
	for i := 0; i < len(spans); {
		j := i
		for j < len(spans) && spans[j].boundUS > 0 && (j == i || !spans[j].from.After(spans[j-1].to)) {
			j++
		}
		if j == i {
			i++
			continue
		}
		c.printf(`<polygon points="`)
		for _, s := range spans[i:j] {
			c.printf("%.1f,%.1f %.1f,%.1f ", c.x(s.from), c.y.at(s.boundUS), c.wide(s), c.y.at(s.boundUS))
		}
		for _, s := range slices.Backward(spans[i:j]) {
			c.printf("%.1f,%.1f %.1f,%.1f ", c.wide(s), c.y.at(-s.boundUS), c.x(s.from), c.y.at(-s.boundUS))
		}
		c.printf(`"/>` + "\n")
		i = j
	}
	c.printf("</g>\n")
}

// wide is where a span ends in the picture: the last point has no length, and would not be seen.
func (c *canvas) wide(s span) float64 { return max(c.x(s.to), min(c.x(s.from)+1.5, width-right)) }

func (c *canvas) threshold() {
	us := c.d.Accuracy.Microseconds()
	c.printf(`<g class="accuracy" stroke="#c81e1e" stroke-width="1.5" stroke-dasharray="7 5">` + "\n")
	for _, v := range []int64{us, -us} {
		c.printf(`<line x1="%g" x2="%g" y1="%.1f" y2="%.1f"/>`+"\n", left, width-right, c.y.at(v), c.y.at(v))
	}
	c.printf("</g>\n")
}

// thresholdLabel is drawn after the offsets, with a rim, so that none hides it.
func (c *canvas) thresholdLabel() {
	c.printf(`<text x="%g" y="%.1f" fill="#c81e1e" stroke="#ffffff" stroke-width="4" paint-order="stroke">准确度 ±%s，误差上限超出即拒绝盖时间戳</text>`+"\n",
		left+6, c.y.at(-c.d.Accuracy.Microseconds())+18, text(c.d.Accuracy.String()))
}

// offsets draws each source: a line through what it said last in each span, a bar where there was more than one value, and
// a hollow mark where it was no candidate or was outvoted.
func (c *canvas) offsets(spans []span) {
	for i, name := range names(spans) {
		colour := colours[i%len(colours)]
		c.printf(`<g class="source" data-source="%s" stroke="%s" fill="%s">`+"\n", text(name), colour, colour)
		var line bytes.Buffer
		var last time.Time
		flush := func() {
			if line.Len() > 0 {
				c.printf(`<polyline fill="none" stroke-width="1.4" points="%s"/>`+"\n", bytes.TrimSpace(line.Bytes()))
			}
			line.Reset()
		}
		for _, s := range spans {
			j := slices.IndexFunc(s.sources, func(m mark) bool { return m.name == name })
			if j < 0 {
				continue
			}
			m := s.sources[j]
			x := c.x(s.from.Add(s.to.Sub(s.from) / 2))
			if s.to.Sub(s.from) < 10*time.Minute {
				x = c.x(s.from)
			}
			if s.from.After(last) && !last.IsZero() { // it said nothing in between
				flush()
			}
			last = s.to
			fmt.Fprintf(&line, "%.1f,%.1f ", x, c.y.at(m.last))
			if m.least != m.most {
				c.printf(`<line class="range" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke-width="%.1f" stroke-opacity="0.35"/>`+"\n", x, x, c.y.at(m.most), c.y.at(m.least), min(5, 300/float64(len(spans))))
			}
			r, fill := radius(len(spans)), ""
			if !m.candidate {
				r, fill = max(r, 2.2), ` fill="#ffffff"`
			}
			c.printf(`<circle cx="%.1f" cy="%.1f" r="%g"%s/>`+"\n", x, c.y.at(m.last), r, fill)
		}
		flush()
		c.printf("</g>\n")
	}
}

func radius(spans int) float64 {
	if spans > 400 {
		return 1.2
	}
	return 2.4
}

func names(spans []span) []string {
	seen := map[string]bool{}
	for _, s := range spans {
		for _, m := range s.sources {
			seen[m.name] = true
		}
	}
	return slices.Sorted(maps.Keys(seen))
}

// strip shows the state, where anything was recorded.
func (c *canvas) strip(spans []span) {
	c.printf(`<g class="states">` + "\n")
	for _, p := range c.d.stretches(spans) {
		fill := "#ffffff"
		for _, s := range states {
			if s.state == p.state {
				fill = s.fill
			}
		}
		c.printf(`<rect data-state="%s" x="%.1f" y="%g" width="%.1f" height="%g" fill="%s"><title>%s</title></rect>`+"\n", text(string(p.state)),
			c.x(p.from), stripTop, max(c.x(p.to)-c.x(p.from), 1.5), stripBottom-stripTop, fill, text(p.from.In(c.d.Zone).Format("2006-01-02 15:04:05")+" "+string(p.state)))
	}
	c.printf("</g>\n")
	c.printf(`<rect x="%g" y="%g" width="%g" height="%g" fill="none" stroke="#9aa5b1"/>`+"\n", left, stripTop, width-left-right, stripBottom-stripTop)
}

type stretch struct {
	from, to time.Time
	state    ntp.State
}

// stretches are the states between changes, cut to where something was recorded: what was before a start is not known. A
// change from another state than the one before it left behind is of a later start: what that start recorded up to it was
// spent in the state that it came from, and nothing of that says what was before. Where no change says it, what was
// recorded does.
func (d *Data) stretches(spans []span) []stretch {
	changes := slices.Clone(d.Changes)
	slices.SortStableFunc(changes, func(a, b ledger.Change) int { return cmp.Compare(a.At.UnixNano(), b.At.UnixNano()) })
	var out []stretch
	add := func(from, to time.Time, state ntp.State) { // "": as recorded
		from, to = later(from, d.From), earlier(to, d.To)
		for _, s := range spans {
			a, b, state := later(from, s.from), earlier(to, s.to), cmp.Or(state, s.state)
			if !a.Before(b) || state == "" {
				continue
			}
			if n := len(out); n > 0 && out[n-1].state == state && !out[n-1].to.Before(a) {
				out[n-1].to = b
				continue
			}
			out = append(out, stretch{a, b, state})
		}
	}
	at, state := d.From, ntp.State("")
	for _, c := range changes {
		if c.From != state {
			begun := unbroken(spans, c.At)
			add(at, begun, state)
			at = later(at, begun)
		}
		add(at, c.At, c.From)
		at, state = c.At, c.To
	}
	add(at, d.To, state)
	return out
}

// unbroken is since when there are records without a gap up to at.
func unbroken(spans []span, at time.Time) time.Time {
	begun := at
	for _, s := range slices.Backward(spans) {
		if !s.from.After(begun) && !s.to.Before(begun) {
			begun = s.from
		}
	}
	return begun
}

func (c *canvas) legend(spans []span) {
	c.printf(`<g class="legend">` + "\n")
	x := left
	for i, name := range names(spans) {
		c.printf(`<line x1="%g" x2="%g" y1="%g" y2="%g" stroke="%s" stroke-width="3"/><text x="%g" y="%g">%s</text>`+"\n", x, x+22, legendTop, legendTop, colours[i%len(colours)], x+28, legendTop+4.5, text(name))
		x += 50 + 8.5*float64(len([]rune(name)))
	}
	c.printf(`<text x="%g" y="%g" fill="#52606d">空心：不合格或被多数否决 hollow: unfit or outvoted</text>`+"\n", x, legendTop+4.5)
	x = left
	for _, s := range states {
		c.printf(`<rect x="%g" y="%g" width="22" height="12" fill="%s"/><text x="%g" y="%g">%s</text>`+"\n", x, legendTop+legendLines-6, s.fill, x+28, legendTop+legendLines+4.5, s.name)
		x += 165
	}
	c.printf("</g>\n")
}
