//go:build linux

// Command fill stands in the place of the status screen in an image for tests: told at the console, it takes all the room of
// the data volume, and gives it back.
package main

import (
	"bufio"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"yinjian/iso/layout"
)

func main() {
	const file = layout.DataMount + "/fill"
	words := bufio.NewScanner(os.Stdin)
	for words.Scan() {
		switch words.Text() {
		case "fill":
			if err := fill(file); err != nil {
				fmt.Printf("fill: %v\r\n", err)
				continue
			}
			fmt.Print("FILLED\r\n")
		case "free":
			fmt.Printf("FREED %v\r\n", os.Remove(file))
		}
	}
}

// fill makes a file of all the room there is, in ever smaller pieces.
func fill(name string) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	var at int64
	for piece := int64(1 << 30); piece >= 4096; {
		switch err := unix.Fallocate(int(f.Fd()), 0, at, piece); err {
		case nil:
			at += piece
		case unix.ENOSPC:
			piece /= 2
		default:
			return err
		}
	}
	return f.Sync()
}
