package vmtest_test

import (
	"os"
	"path/filepath"
	"testing"

	"yinjian/iso/vmtest"
)

// The image for arm64 (make image ARCH=arm64), in an emulated machine of that architecture with Secure Boot and a TPM: from the
// medium to a signature, over a power cut, unattended; and what was changed on its disk does not start.
func TestArm64(t *testing.T) {
	if os.Getenv("YINJIAN_LONG") == "" {
		t.Skip("YINJIAN_LONG is not set: make image-test-long")
	}
	dir := os.Getenv("YINJIAN_IMAGE_ARM64")
	if dir == "" {
		t.Skip("YINJIAN_IMAGE_ARM64 is not set: make image ARCH=arm64")
	}
	if arch := vmtest.Arch(t, filepath.Join(dir, "disk.efi")); arch != "arm64" {
		t.Fatalf("%s is an image for %s", dir, arch)
	}
	t.Setenv("YINJIAN_IMAGE", dir)
	t.Setenv("YINJIAN_IMAGE_KEYS", dir+"-keys")
	t.Run("image", TestImage)
	t.Run("changed disk", TestChangedDisk)
}
