//go:build linux

// Command yinjian-paint writes Chinese on the screen of a machine that runs the sealed image, from when init has handed over to
// the last message before the machine is switched off. See package screen.
package main

import (
	"fmt"
	"os"

	"yinjian/iso/layout"
	"yinjian/iso/screen"
)

func main() {
	err := screen.Watch(func() (screen.Font, error) {
		text, err := os.ReadFile(layout.ScreenFont)
		if err != nil {
			return nil, err
		}
		return screen.ParseFont(text)
	})
	fmt.Fprintln(os.Stderr, "yinjian-paint:", err)
	os.Exit(1)
}
