package main

import "fmt"

// growthPlot draws the processor time of each case over the journal's size, both logarithmic.
func growthPlot(sizes []uint64, lines []*growthLine) []byte {
	c := chart{
		title: "日志增长的代价：每次操作的处理器时间 (what growth costs: processor time of an operation)", logX: true, logY: true,
		xText: func(n float64) string { return fmt.Sprintf("%.0f 条", n) }, yText: microText,
	}
	for _, n := range sizes {
		c.xTicks = append(c.xTicks, float64(n))
	}
	for _, l := range lines {
		s := series{name: l.Name}
		for _, n := range sizes {
			s.points = append(s.points, [2]float64{float64(n), growthCPU(l, n)})
		}
		c.series = append(c.series, s)
	}
	return c.svg()
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
