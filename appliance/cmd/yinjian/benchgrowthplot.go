package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// growthPlot draws the processor time of each case over the journal's size, both logarithmic, as SVG 1.1.
func growthPlot(sizes []uint64, lines []*growthLine) []byte {
	const width, height, left, right, top, bottom = 900.0, 520.0, 70.0, 190.0, 50.0, 470.0
	least, most := math.Inf(1), 0.0
	for _, l := range lines {
		for _, n := range sizes {
			v := growthCPU(l, n)
			least, most = min(least, v), max(most, v)
		}
	}
	low, high := math.Floor(math.Log10(least)), math.Ceil(math.Log10(most))
	from, to := math.Log10(float64(sizes[0])), math.Log10(float64(sizes[len(sizes)-1]))
	x := func(n uint64) float64 { return left + (width-left-right)*(math.Log10(float64(n))-from)/(to-from) }
	y := func(v float64) float64 { return bottom - (bottom-top)*(math.Log10(v)-low)/(high-low) }

	var out strings.Builder
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&out, `<rect width="%.0f" height="%.0f" fill="#ffffff"/>`+"\n", width, height)
	fmt.Fprintf(&out, `<text x="%.0f" y="24" font-size="15">日志增长的代价：每次操作的处理器时间 (what growth costs: processor time of an operation)</text>`+"\n", left)
	for e := low; e <= high; e++ {
		v := math.Pow(10, e)
		fmt.Fprintf(&out, `<path d="M%.1f %.1fH%.1f" stroke="#dddddd"/><text x="%.1f" y="%.1f" text-anchor="end">%s</text>`+"\n", left, y(v), width-right, left-6, y(v)+4, microText(v))
	}
	for _, n := range sizes {
		fmt.Fprintf(&out, `<path d="M%.1f %.1fV%.1f" stroke="#eeeeee"/><text x="%.1f" y="%.1f" text-anchor="middle">%d 条</text>`+"\n", x(n), top, bottom, x(n), bottom+18, n)
	}
	colours := []string{"#1b4f9c", "#c2571a", "#2b8a57", "#6d1f7a", "#a3341f", "#0f7c8a", "#8a6d1a", "#444444", "#d1498b", "#5a8f29"}
	type label struct {
		at           float64
		name, colour string
	}
	var labels []label
	for i, l := range lines {
		colour := colours[i%len(colours)]
		var points []string
		for _, n := range sizes {
			points = append(points, fmt.Sprintf("%.1f,%.1f", x(n), y(growthCPU(l, n))))
		}
		fmt.Fprintf(&out, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(points, " "), colour)
		labels = append(labels, label{y(growthCPU(l, sizes[len(sizes)-1])), l.Name, colour})
	}
	slices.SortFunc(labels, func(a, b label) int { return int(math.Copysign(1, a.at-b.at)) })
	at := top - 14
	for _, l := range labels { // none upon another
		at = max(at+14, l.at+4)
		fmt.Fprintf(&out, `<text x="%.1f" y="%.1f" fill="%s">%s</text>`+"\n", width-right+8, at, l.colour, l.name)
	}
	out.WriteString("</svg>\n")
	return []byte(out.String())
}

// growthCPU is the median processor time of a case at a size, µs; never 0, which has no logarithm.
func growthCPU(l *growthLine, size uint64) float64 {
	return max(spreadOf(each(l.Costs[size], cpuOf)).Median, 0.1)
}

// microText is a time given in µs.
func microText(us float64) string {
	switch {
	case us >= 1e6:
		return fmt.Sprintf("%g s", us/1e6)
	case us >= 1e3:
		return fmt.Sprintf("%g ms", us/1e3)
	}
	return fmt.Sprintf("%g µs", us)
}
