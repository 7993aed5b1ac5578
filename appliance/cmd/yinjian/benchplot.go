package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// A chart is lines over a common x, drawn as SVG 1.1 with the lines' names at their right ends.
type chart struct {
	title          string
	logX, logY     bool
	xTicks, yTicks []float64 // at most as many as have room; yTicks nil: chosen by the chart
	xText, yText   func(float64) string
	series         []series
	spans          []chartSpan
}

// A series is one line; its points are in the order of x. A name that begins with "~" has its line dashed, without the sign.
type series struct {
	name   string
	points [][2]float64
}

// A chartSpan is a stretch of x that has a name.
type chartSpan struct {
	from, to float64
	name     string
}

const chartWidth, chartHeight, chartLeft, chartRight, chartTop, chartBottom = 900.0, 520.0, 70.0, 190.0, 50.0, 470.0

var chartColours = []string{"#1b4f9c", "#c2571a", "#2b8a57", "#6d1f7a", "#a3341f", "#0f7c8a", "#8a6d1a", "#444444", "#d1498b", "#5a8f29"}

func (c chart) svg() []byte {
	onX, onY := func(v float64) float64 { return v }, func(v float64) float64 { return v }
	if c.logX {
		onX = math.Log10
	}
	if c.logY {
		onY = math.Log10
	}
	from, to, low, high := math.Inf(1), math.Inf(-1), math.Inf(1), math.Inf(-1)
	for _, s := range c.series {
		for _, p := range s.points {
			from, to, low, high = min(from, onX(p[0])), max(to, onX(p[0])), min(low, onY(p[1])), max(high, onY(p[1]))
		}
	}
	if from > to { // there are no points, and a scale from infinity would have ticks without end
		from, to, low, high = 0, 1, 0, 1
	}
	if c.logY {
		low, high = math.Floor(low), math.Ceil(high)
	} else {
		low = 0
	}
	if high <= low {
		high = low + 1
	}
	if to <= from {
		to = from + 1
	}
	ticks := c.yTicks
	switch {
	case ticks != nil:
	case c.logY:
		for e := low; e <= high; e++ {
			ticks = append(ticks, math.Pow(10, e))
		}
	default:
		step := math.Pow(10, math.Floor(math.Log10(high)))
		for _, f := range []float64{0.1, 0.2, 0.5, 1} {
			if high/(f*step) <= 8 {
				step *= f
				break
			}
		}
		for v := 0.0; v <= high+step/1000; v += step {
			ticks = append(ticks, v)
		}
	}
	x := func(v float64) float64 { return chartLeft + (chartWidth-chartLeft-chartRight)*(onX(v)-from)/(to-from) }
	y := func(v float64) float64 { return chartBottom - (chartBottom-chartTop)*(onY(v)-low)/(high-low) }

	var out strings.Builder
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="sans-serif" font-size="12">`+"\n", chartWidth, chartHeight)
	fmt.Fprintf(&out, `<rect width="%.0f" height="%.0f" fill="#ffffff"/>`+"\n", chartWidth, chartHeight)
	fmt.Fprintf(&out, `<text x="%.0f" y="24" font-size="15">%s</text>`+"\n", chartLeft, xmlText(c.title))
	for i, s := range c.spans {
		fmt.Fprintf(&out, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="#f3e3d8"/>`, x(s.from), chartTop, max(1, x(s.to)-x(s.from)), chartBottom-chartTop)
		fmt.Fprintf(&out, `<text x="%.1f" y="%.1f" font-size="9" fill="#8a5a3a">%s</text>`+"\n", x(s.from), chartTop+10+float64(i%4)*10, xmlText(s.name))
	}
	for _, v := range ticks {
		fmt.Fprintf(&out, `<path d="M%.1f %.1fH%.1f" stroke="#dddddd"/><text x="%.1f" y="%.1f" text-anchor="end">%s</text>`+"\n", chartLeft, y(v), chartWidth-chartRight, chartLeft-6, y(v)+4, xmlText(c.yText(v)))
	}
	for _, v := range c.xTicks {
		if at := x(v); at < chartLeft-1 || at > chartWidth-chartRight+1 {
			continue // beside the plot
		}
		fmt.Fprintf(&out, `<path d="M%.1f %.1fV%.1f" stroke="#eeeeee"/><text x="%.1f" y="%.1f" text-anchor="middle">%s</text>`+"\n", x(v), chartTop, chartBottom, x(v), chartBottom+18, xmlText(c.xText(v)))
	}
	type label struct {
		at           float64
		name, colour string
	}
	var labels []label
	for i, s := range c.series {
		if len(s.points) == 0 {
			continue
		}
		colour, dash := chartColours[i%len(chartColours)], ""
		name, dashed := strings.CutPrefix(s.name, "~")
		if dashed {
			dash = ` stroke-dasharray="6 4"`
		}
		var points []string
		for _, p := range s.points {
			points = append(points, fmt.Sprintf("%.1f,%.1f", x(p[0]), y(p[1])))
		}
		fmt.Fprintf(&out, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"%s/>`+"\n", strings.Join(points, " "), colour, dash)
		labels = append(labels, label{y(s.points[len(s.points)-1][1]), name, colour})
	}
	slices.SortFunc(labels, func(a, b label) int { return int(math.Copysign(1, a.at-b.at)) })
	at := chartTop - 14
	for _, l := range labels { // none upon another
		at = max(at+14, l.at+4)
		fmt.Fprintf(&out, `<text x="%.1f" y="%.1f" fill="%s">%s</text>`+"\n", chartWidth-chartRight+8, at, l.colour, xmlText(l.name))
	}
	out.WriteString("</svg>\n")
	return []byte(out.String())
}

func xmlText(s string) string {
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;").Replace(s)
}

// evenly are so many values from 0 to most, in steps of 1, 2 or 5 times a power of ten of unit.
func evenly(most, unit float64, about int) (ticks []float64) {
	step := unit
	for _, f := range []float64{2, 2.5, 2, 2, 2.5, 2, 2, 2.5, 2, 2, 2.5, 2} {
		if most/step <= float64(about) {
			break
		}
		step *= f
	}
	for v := 0.0; v <= most; v += step {
		ticks = append(ticks, v)
	}
	return ticks
}
