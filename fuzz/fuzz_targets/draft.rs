#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tightwad_fuzz::draft(input));
