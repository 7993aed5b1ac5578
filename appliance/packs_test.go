package appliance

import (
	"slices"
	"strings"
	"testing"
)

// What a library is loaded with does not lead to the agents, and is otherwise what we have.
func TestWorkersEnvironment(t *testing.T) {
	t.Setenv(PackSocket, "/run/packs")
	t.Setenv(UpdateSocket, "/run/update")
	t.Setenv("YINJIAN_TEST_VALUE", "1")
	module, env, err := (&Appliance{}).moduleOf(t.Context(), "/opt/vendor.so")
	if err != nil || module != "/opt/vendor.so" || !slices.Contains(env, "YINJIAN_TEST_VALUE=1") || strings.Contains(strings.Join(env, "\n"), "_SOCKET=/run/") {
		t.Errorf("%s, %v, %v", module, env, err)
	}
}
