// Command docs writes what is generated of the documentation: `go run ./packaging/docs api|configuration|licences|sbom|report`, from the
// top of the repository, to standard output. It is no part of the product.
package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"
)

var commands = map[string]func(w io.Writer) error{
	"api":           func(w io.Writer) error { return writeAPI(w, "api/openapi.json") },
	"configuration": func(w io.Writer) error { return writeConfiguration(w, ".") },
	"licences":      func(w io.Writer) error { return writeLicences(w, ".") },
	"sbom":          func(w io.Writer) error { return writeSBOM(w, ".") },
	"report":        func(w io.Writer) error { return writeReport(w, os.Stdin) },
}

func main() {
	if len(os.Args) != 2 || commands[os.Args[1]] == nil {
		var names []string
		for name := range commands {
			names = append(names, name)
		}
		slices.Sort(names)
		fmt.Fprintln(os.Stderr, "docs: one of", names)
		os.Exit(2)
	}
	var out bytes.Buffer
	err := commands[os.Args[1]](&out)
	if err == nil {
		_, err = out.WriteTo(os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "docs:", err)
		os.Exit(1)
	}
}
