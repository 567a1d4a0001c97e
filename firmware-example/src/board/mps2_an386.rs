//! The board: an MPS2 with the FPGA image AN386 (Cortex-M4, 4 MiB for code, 4 MiB for data) as QEMU's `mps2-an386` plays
//! it.
//!
//! The only file that names the chip. Out of it come a clock, an Ethernet device for smoltcp and an LED. No interrupt
//! handler ever runs: interrupts stay masked, and only wake the processor where it rests.

use core::cell::Cell;
use core::ptr;
use core::sync::atomic::{AtomicBool, Ordering};

use cortex_m::interrupt::InterruptNumber;
use cortex_m::peripheral::NVIC;
use critical_section::Mutex;
use firmware_example::net;
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use crate::runtime;

/// The one clock of this board, which everything runs from.
const TICKS_PER_SECOND: u32 = 25_000_000;

/// One tick in nanoseconds: how fine [`instructions`] is.
const TICK_NS: u64 = 40;

const _: () = assert!(TICKS_PER_SECOND as u64 * TICK_NS == 1_000_000_000);

/// Everything on the board, brought up.
pub(crate) struct Board {
    /// Milliseconds, and rest.
    pub(crate) clock: Clock,
    /// The Ethernet controller.
    pub(crate) ethernet: Ethernet,
    /// The one LED.
    pub(crate) led: Led,
}

impl Board {
    /// Brings the chip up. Only the first call returns the board.
    pub(crate) fn take() -> Option<Self> {
        runtime::start()?;
        Some(Self { clock: Clock::start(), ethernet: Ethernet::start(), led: Led::start() })
    }
}

// --- registers -----------------------------------------------------------------------------------------------

/// A device register of this board. Only the constants of this file make one.
#[derive(Clone, Copy)]
struct Register(usize);

impl Register {
    const fn at(base: usize, offset: usize) -> Self {
        Self(base + offset)
    }

    fn read(self) -> u32 {
        // SAFETY: every `Register` is a word-aligned device register of the MPS2 with AN386; reading one has effects
        // on the device alone, never on memory.
        unsafe { ptr::read_volatile(self.0 as *const u32) }
    }

    fn write(self, value: u32) {
        // SAFETY: as for `read`; neither the Ethernet controller nor the timer of this board writes to memory.
        unsafe { ptr::write_volatile(self.0 as *mut u32, value) }
    }
}

/// The interrupts that end a rest.
#[derive(Clone, Copy)]
enum Wake {
    Timer0 = 8,
    Ethernet = 13,
}

/// The board's part of the vector table. None of it is ever taken; it is here so that the 240 vectors that an unknown
/// chip might have are not.
#[unsafe(link_section = ".vector_table.interrupts")]
#[unsafe(no_mangle)]
static __INTERRUPTS: [unsafe extern "C" fn(); Wake::Ethernet as usize + 1] =
    [DefaultHandler; Wake::Ethernet as usize + 1];

unsafe extern "C" {
    fn DefaultHandler();
}

// SAFETY: the numbers are those of AN386's vector table, and fixed.
unsafe impl InterruptNumber for Wake {
    fn number(self) -> u16 {
        self as u16
    }
}

// --- clock ---------------------------------------------------------------------------------------------------

/// The FPGA's own registers: what the board has beside the processor's peripherals.
mod fpga {
    use super::Register;

    const BASE: usize = 0x4002_8000;
    pub(super) const LEDS: Register = Register::at(BASE, 0x00);
    /// Counts the clock's ticks up, one for each `PRESCALE` + 1.
    pub(super) const COUNTER: Register = Register::at(BASE, 0x18);
    pub(super) const PRESCALE: Register = Register::at(BASE, 0x1C);
}

/// A timer of the processor's subsystem, which ends rests. It counts down.
mod timer {
    use super::Register;

    const BASE: usize = 0x4000_0000;
    pub(super) const CONTROL: Register = Register::at(BASE, 0x00);
    pub(super) const VALUE: Register = Register::at(BASE, 0x04);
    pub(super) const RELOAD: Register = Register::at(BASE, 0x08);
    pub(super) const CLEAR: Register = Register::at(BASE, 0x0C);

    pub(super) const ENABLE: u32 = 1 << 0;
    pub(super) const INTERRUPT: u32 = 1 << 3;
}

/// The latest time that was told, in ticks.
static LATEST: Mutex<Cell<u64>> = Mutex::new(Cell::new(0));

/// The time since the board was brought up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(());

impl Clock {
    fn start() -> Self {
        fpga::PRESCALE.write(0);
        fpga::COUNTER.write(0);
        Self(())
    }
}

impl net::Clock for Clock {
    fn now(&self) -> u64 {
        now_ms()
    }

    /// Sleeps until a frame arrives or the time has come.
    fn rest(&self, until: u64) {
        let ticks_per_ms = TICKS_PER_SECOND / 1000;
        let ticks = (until.saturating_mul(ticks_per_ms.into())).saturating_sub(ticks());
        // Never longer than a second: whoever rests for ever would not see the counter come round.
        let mut ticks = u32::try_from(ticks).unwrap_or(u32::MAX).min(TICKS_PER_SECOND);
        if SENT.load(Ordering::Relaxed) {
            // QEMU looks at the sockets behind its user network when some timer is due sooner than all
            // others, and would find out about this frame up to a second late.
            SENT.store(false, Ordering::Relaxed);
            ticks = ticks.min(ticks_per_ms);
        }
        if ticks == 0 {
            return;
        }

        timer::CONTROL.write(0);
        timer::CLEAR.write(1);
        timer::RELOAD.write(ticks);
        timer::VALUE.write(ticks);
        ethernet::STATUS.write(ethernet::RECEIVED);
        NVIC::unpend(Wake::Timer0);
        NVIC::unpend(Wake::Ethernet);

        // Whatever happens from here on is pending, so that `wfi` returns at once: masked interrupts wake
        // the processor all the same.
        timer::CONTROL.write(timer::ENABLE | timer::INTERRUPT);
        if Ethernet::frames() == 0 {
            cortex_m::asm::wfi();
        }
        timer::CONTROL.write(0);
    }
}

/// Milliseconds since the board was brought up, never going back.
pub(crate) fn now_ms() -> u64 {
    ticks() / u64::from(TICKS_PER_SECOND / 1000)
}

/// Instructions executed since the board was brought up, when QEMU runs with `-icount shift=0`.
///
/// In truth it counts nanoseconds, and that option makes each instruction take one. It advances in steps
/// of 40, and by the time slept wherever the processor rested in between. Without the option it measures
/// the host's time.
pub(crate) fn instructions() -> u64 {
    ticks() * TICK_NS
}

/// Ticks since the board was brought up. The counter comes round every 171 s; whoever asks at least so often, as
/// everybody does who rests for a second at most, misses none of its rounds.
fn ticks() -> u64 {
    critical_section::with(|cs| {
        let latest = LATEST.borrow(cs);
        let [b0, b1, b2, b3, ..] = latest.get().to_le_bytes();
        let passed = fpga::COUNTER.read().wrapping_sub(u32::from_le_bytes([b0, b1, b2, b3]));
        latest.set(latest.get() + u64::from(passed));
        latest.get()
    })
}

// --- Ethernet ------------------------------------------------------------------------------------------------

/// The longest frame without its CRC, as every Ethernet has it.
const FRAME_LEN: usize = 1_514;

const HEADER_LEN: usize = 14;

/// A LAN9118 on the processor's bus, 32 bits wide.
mod ethernet {
    use super::Register;

    const BASE: usize = 0x4020_0000;
    /// The FIFOs, a word at a time.
    pub(super) const RX_DATA: Register = Register::at(BASE, 0x00);
    pub(super) const TX_DATA: Register = Register::at(BASE, 0x20);
    /// One word for each frame in `RX_DATA`; reading takes it away.
    pub(super) const RX_STATUS: Register = Register::at(BASE, 0x40);
    pub(super) const INTERRUPT_PIN: Register = Register::at(BASE, 0x54);
    /// What has happened; writing a bit acknowledges it.
    pub(super) const STATUS: Register = Register::at(BASE, 0x58);
    pub(super) const MASK: Register = Register::at(BASE, 0x5C);
    pub(super) const LEVELS: Register = Register::at(BASE, 0x68);
    pub(super) const RX_CONFIG: Register = Register::at(BASE, 0x6C);
    pub(super) const TX_CONFIG: Register = Register::at(BASE, 0x70);
    pub(super) const HARDWARE: Register = Register::at(BASE, 0x74);
    /// Bits 23 to 16: frames that have arrived.
    pub(super) const RX_LEVEL: Register = Register::at(BASE, 0x7C);
    /// Bits 15 to 0: free bytes.
    pub(super) const TX_LEVEL: Register = Register::at(BASE, 0x80);
    pub(super) const POWER: Register = Register::at(BASE, 0x84);
    /// The way to the MAC's registers, which have numbers.
    pub(super) const MAC_COMMAND: Register = Register::at(BASE, 0xA4);
    pub(super) const MAC_DATA: Register = Register::at(BASE, 0xA8);
    pub(super) const EEPROM: Register = Register::at(BASE, 0xB0);

    pub(super) const RECEIVED: u32 = 1 << 3;
    /// The FIFOs no longer agree with what goes in or out of them: only a reset helps.
    pub(super) const LOST: u32 = 1 << 13 | 1 << 14;

    pub(super) const MAC_CONTROL: u32 = 1;
    pub(super) const MAC_ADDRESS_HIGH: u32 = 2;
    pub(super) const MAC_ADDRESS_LOW: u32 = 3;
}

/// Whether a frame was sent since the last rest.
static SENT: AtomicBool = AtomicBool::new(false);

/// The Ethernet controller, as a smoltcp device.
///
/// Frames wait in the controller's FIFOs and pass through the stack of whoever handles them, where RSA
/// needs more room at other times: no memory is set aside for them.
pub(crate) struct Ethernet {
    mac: [u8; 6],
}

impl Ethernet {
    fn start() -> Self {
        Self::reset();
        let [a, b, c, d] = Self::mac_register(ethernet::MAC_ADDRESS_LOW).to_le_bytes();
        let [e, f, ..] = Self::mac_register(ethernet::MAC_ADDRESS_HIGH).to_le_bytes();
        let mut mac = [a, b, c, d, e, f];
        if a & 1 != 0 {
            // No EEPROM has told it an address: one that nobody assigned, until the next start.
            let [b, c, d, e, f] = runtime::simulation_only_entropy();
            mac = [0x02, b, c, d, e, f];
        }
        Self::configure(mac);

        // SAFETY: no handler exists that an interrupt could break in on; interrupts stay masked.
        unsafe {
            NVIC::unmask(Wake::Ethernet);
            NVIC::unmask(Wake::Timer0);
        }
        Self { mac }
    }

    /// A reset of the core leaves the controller running, with the frames of the time before; this does not. (QEMU answers
    /// with `Timer with period zero, disabling`, and means a timer of the controller that nobody uses.)
    fn reset() {
        use ethernet::*;
        const READY: u32 = 1;
        const SOFT_RESET: u32 = 1;
        const LOADING: u32 = 1 << 31;

        while POWER.read() & READY == 0 {}
        HARDWARE.write(SOFT_RESET);
        while HARDWARE.read() & SOFT_RESET != 0 || EEPROM.read() & LOADING != 0 {}
    }

    /// After a reset: frames for this address and for all, an interrupt as soon as one is there.
    fn configure(mac: [u8; 6]) {
        use ethernet::*;
        const MUST_BE_ONE: u32 = 1 << 20;
        const TX_FIFO_5_KIB: u32 = 5 << 16;
        const STATUS_MAY_OVERRUN: u32 = 1 << 2;
        const TRANSMITTER_ON: u32 = 1 << 1;
        const PUSH_PULL_ACTIVE_HIGH: u32 = 1 << 0 | 1 << 4;
        const PIN_ENABLE: u32 = 1 << 8;
        const MAC_RX: u32 = 1 << 2;
        const MAC_TX: u32 = 1 << 3;
        const MAC_FULL_DUPLEX: u32 = 1 << 20;

        HARDWARE.write(MUST_BE_ONE | TX_FIFO_5_KIB);
        LEVELS.write(0);
        RX_CONFIG.write(0);
        TX_CONFIG.write(STATUS_MAY_OVERRUN | TRANSMITTER_ON);
        let [a, b, c, d, e, f] = mac;
        Self::set_mac_register(MAC_ADDRESS_LOW, u32::from_le_bytes([a, b, c, d]));
        Self::set_mac_register(MAC_ADDRESS_HIGH, u32::from_le_bytes([e, f, 0, 0]));
        Self::set_mac_register(MAC_CONTROL, MAC_RX | MAC_TX | MAC_FULL_DUPLEX);
        STATUS.write(u32::MAX);
        MASK.write(RECEIVED);
        INTERRUPT_PIN.write(PIN_ENABLE | PUSH_PULL_ACTIVE_HIGH);
    }

    fn mac_register(number: u32) -> u32 {
        Self::mac_command(1 << 30 | number);
        ethernet::MAC_DATA.read()
    }

    fn set_mac_register(number: u32, value: u32) {
        ethernet::MAC_DATA.write(value);
        Self::mac_command(number);
    }

    fn mac_command(command: u32) {
        const BUSY: u32 = 1 << 31;
        ethernet::MAC_COMMAND.write(BUSY | command);
        while ethernet::MAC_COMMAND.read() & BUSY != 0 {}
    }

    /// Frames that have arrived and were not taken yet.
    fn frames() -> u32 {
        ethernet::RX_LEVEL.read() >> 16 & 0xFF
    }

    /// Whether a frame of any length finds room now, with its two command words and a word of padding.
    fn has_room() -> bool {
        const WITH_COMMANDS: u32 = (FRAME_LEN + 12) as u32;
        ethernet::TX_LEVEL.read() & 0xFFFF >= WITH_COMMANDS
    }

    /// The address in use.
    pub(crate) fn mac(&self) -> [u8; 6] {
        self.mac
    }
}

impl Device for Ethernet {
    type RxToken<'a> = Received;
    type TxToken<'a> = Room;

    /// A frame, if its answer would find room: nothing waits inside.
    fn receive(&mut self, _: Instant) -> Option<(Received, Room)> {
        if ethernet::STATUS.read() & ethernet::LOST != 0 {
            Self::reset();
            Self::configure(self.mac);
        }
        (Self::frames() != 0 && Self::has_room()).then_some((Received(()), Room(())))
    }

    fn transmit(&mut self, _: Instant) -> Option<Room> {
        Self::has_room().then_some(Room(()))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_LEN;
        capabilities
    }
}

/// A frame in the receive FIFO; it stays there if it is not consumed.
pub(crate) struct Received(());

impl RxToken for Received {
    /// Takes the frame out of the FIFO. One that is damaged, too long or too short arrives as an empty one, which
    /// smoltcp ignores.
    #[inline(never)] // inlined, each use would add a buffer to the same stack frame
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        const DAMAGED: u32 = 1 << 15;
        const CRC_LEN: usize = 4;
        let mut buffer = [0; (FRAME_LEN + CRC_LEN).next_multiple_of(4)];

        let status = ethernet::RX_STATUS.read();
        let total_len = (status >> 16 & 0x3FFF) as usize;
        let (words, _) = buffer.as_chunks_mut::<4>();
        let mut words = words.iter_mut();
        // Every word of the frame leaves the FIFO, also those that have no place here.
        for _ in 0..total_len.div_ceil(4) {
            let data = ethernet::RX_DATA.read().to_le_bytes();
            if let Some(word) = words.next() {
                *word = data;
            }
        }

        let frame = match total_len.checked_sub(CRC_LEN) {
            Some(len @ HEADER_LEN..=FRAME_LEN) if status & DAMAGED == 0 => buffer.get(..len),
            _ => None,
        };
        f(frame.unwrap_or_default())
    }
}

/// Room in the transmit FIFO for a frame of any length.
pub(crate) struct Room(());

impl TxToken for Room {
    #[inline(never)] // as above
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        const WHOLE: u32 = 1 << 13 | 1 << 12;
        let mut buffer = [0; FRAME_LEN.next_multiple_of(4)];

        // smoltcp asks for no more than the capabilities allow.
        let len = len.min(FRAME_LEN);
        let result = f(buffer.get_mut(..len).unwrap_or_default());

        // Two commands: this piece, which is first and last; and the frame.
        let length = u32::try_from(len).unwrap_or_default();
        ethernet::TX_DATA.write(WHOLE | length);
        ethernet::TX_DATA.write(length);
        let (words, _) = buffer.as_chunks::<4>();
        for word in words.iter().take(len.div_ceil(4)) {
            ethernet::TX_DATA.write(u32::from_le_bytes(*word));
        }
        SENT.store(true, Ordering::Relaxed);
        result
    }
}

// --- LED -----------------------------------------------------------------------------------------------------

/// The first of the board's two user LEDs.
pub(crate) struct Led(());

impl Led {
    fn start() -> Self {
        let mut led = Self(());
        led.set(false);
        led
    }

    /// Switches it.
    pub(crate) fn set(&mut self, on: bool) {
        fpga::LEDS.write(u32::from(on));
    }

    /// Whether the register says it is on.
    pub(crate) fn is_on(&self) -> bool {
        fpga::LEDS.read() & 1 != 0
    }
}
