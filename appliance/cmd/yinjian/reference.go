package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

const referenceHead = `# 命令参考 (command reference)

由 ` + "`make docs`" + ` 从程序自己的帮助写出，勿手工修改。退出码：0 成功，1 失败，2 用法错误；另有约定的写在各命令下。` + "`-o json`" + ` 供程序读取。
(Generated from the program's own help.)
`

// referenceCommand writes the page of the documents; `make docs` calls it.
func referenceCommand() *cobra.Command {
	return &cobra.Command{
		Use: "reference", Hidden: true, Short: "写出命令参考 (write the command reference)", Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			w := c.OutOrStdout()
			fmt.Fprint(w, referenceHead+"\n")
			describe(w, c.Root())
			return nil
		},
	}
}

// describe writes a command and those below it, but hidden ones.
func describe(w io.Writer, c *cobra.Command) {
	fmt.Fprintf(w, "## %s\n\n%s\n", c.CommandPath(), c.Short)
	if c.Runnable() && !c.HasAvailableSubCommands() {
		fmt.Fprintf(w, "\n```\n%s\n```\n", c.UseLine())
	}
	if c.Long != "" {
		fmt.Fprintf(w, "\n```\n%s\n```\n", strings.TrimSpace(c.Long))
	}
	var flags []string
	c.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		initial := f.DefValue
		if initial == "false" || initial == "[]" {
			initial = ""
		}
		if initial != "" {
			initial = "`" + initial + "`"
		}
		flags = append(flags, fmt.Sprintf("| `%s` | %s | %s |\n", name, strings.ReplaceAll(f.Usage, "|", "\\|"), initial))
	})
	if len(flags) > 0 && c.Runnable() && !c.HasAvailableSubCommands() {
		fmt.Fprintf(w, "\n| 参数 flag | 含义 | 缺省 |\n| --- | --- | --- |\n%s", strings.Join(flags, ""))
	}
	fmt.Fprintln(w)
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() {
			describe(w, sub)
		}
	}
}
