for (const figure of document.querySelectorAll("figure.slider")) {
  const slides = figure.querySelectorAll(".slide"), input = figure.querySelector("input");
  if (!input) continue;
  const show = () => {
    slides.forEach((slide, index) => { slide.hidden = index !== Number(input.value); });
    figure.querySelector("output").textContent = slides[input.value].dataset.label;
  };
  input.addEventListener("input", show);
  show();
}
