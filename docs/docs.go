// Package docs holds those pages of this folder that the program itself shows.
package docs

import _ "embed"

// Threats is threats.md: what attackers must not be able to do, and what proves it.
//
//go:embed threats.md
var Threats string

// Xinchuang is xinchuang.md: of what the product is made, where that comes from and what stands in for it.
//
//go:embed xinchuang.md
var Xinchuang string
