package api

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestClientsPage holds the table of docs/clients/README.md against faces and openapi.json: each way to retry has a row,
// and all codes but those of never stand in the row of theirs.
func TestClientsPage(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../docs/clients/README.md")
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile("(?m)^\\| `retry` 为 `([a-z-]+)`：([^|]*)\\|")
	listed := map[string][]string{}
	for _, m := range row.FindAllStringSubmatch(string(page), -1) {
		listed[m[1]] = []string{}
		for _, code := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(m[2], -1) {
			listed[m[1]] = append(listed[m[1]], code[1])
		}
	}
	want := map[string][]string{"never": {}}
	for code, f := range faces {
		if f.retry != "never" {
			want[string(f.retry)] = append(want[string(f.retry)], string(code))
		}
	}
	var contract struct {
		Components struct {
			Schemas struct {
				Problem struct {
					Properties struct {
						Retry struct{ Enum []string }
					}
				}
			}
		}
	}
	if err := json.Unmarshal(openAPI, &contract); err != nil {
		t.Fatal(err)
	}
	ways := contract.Components.Schemas.Problem.Properties.Retry.Enum
	if len(ways) != len(listed) || len(ways) == 0 {
		t.Errorf("openapi.json has %q, the page has rows for %d", ways, len(listed))
	}
	for _, way := range ways {
		slices.Sort(want[way])
		if got, ok := listed[way]; !ok || !slices.Equal(got, want[way]) {
			t.Errorf("docs/clients/README.md: the row of `%s` should have `%s`, it has `%s`", way, strings.Join(want[way], "`、`"), strings.Join(got, "`、`"))
		}
	}
}
